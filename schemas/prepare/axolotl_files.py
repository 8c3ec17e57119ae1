"""Files, folders and names on the hub that an entry of Axolotl's `datasets:` may refer to."""

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOADERS = ("json", "csv", "parquet", "arrow", "text")
FOLDER_FILES = ("*.jsonl", "*.json", "*.parquet", "*.arrow", "*.csv", "*.txt")
FILE_ENDS = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".gz", ".zst")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def find_files(entry: Mapping[str, Any], name: object, split: str) -> list[str] | None:
    """The paths or globs of an entry; None where its path is neither here nor a name on the hub."""
    path = entry["path"]
    data_files = entry.get("data_files")
    if isinstance(data_files, dict):
        data_files = data_files.get(split or "train") or next(iter(data_files.values()), None)
    listed = [data_files] if isinstance(data_files, str) else list(data_files or [])
    if listed and (path in LOADERS or Path(path).is_dir()):
        return listed
    if Path(path).is_file() or "://" in path or glob.has_magic(path):
        return [path]
    if HUB_NAME.fullmatch(path) and not path.endswith(FILE_ENDS) and not Path(path).exists():
        hub = [f"hf://datasets/{path}/{file}" for file in listed]
        return hub or [f"hf:{path}:{name or 'default'}:{split or 'train'}"]
    if Path(path).is_dir():
        named = Path(path, str(name or ""))
        folder = named if named.is_dir() else Path(path)
        return folder_files(folder, split) or [str(folder / "*")]
    return None


def folder_files(folder: Path, split: str) -> list[str]:
    """The data files of a folder that are of a split by their names, or all if no name says."""
    files = sorted(str(path) for pattern in FOLDER_FILES for path in folder.rglob(pattern))
    files = [path for path in files if Path(path).name not in ("state.json", "dataset_info.json")]
    named = {
        kind: [path for path in files if has_word(str(Path(path).relative_to(folder)), words)]
        for kind, words in SPLIT_WORDS.items()
    }
    wanted = named.get(split or "train", [])
    others = {path for kind in ("validation", "test") for path in named[kind]}
    return wanted or ([path for path in files if path not in others] if not split else files)


def has_word(text: str, words: tuple[str, ...]) -> bool:
    """Return whether one of some words stands alone in a file's name."""
    return bool({*re.split(r"[^a-z]+", text.lower())} & {*words})
