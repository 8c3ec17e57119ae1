"""`inputs.jsonl`: what the inputs of a directory held, and whether they still do."""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from headrace.dataprep.input.pieces import InputFile
from headrace.dataprep.input.remote import is_remote
from headrace.dataprep.work.workspace import CONFIG_NAME
from headrace.schemas.addresses import recorded
from headrace.schemas.errors import DataError, redact
from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.outside_text import OutsideTextError, parse_json
from headrace.schemas.publish import open_atomic

INPUTS_NAME = "inputs.jsonl"


def record_inputs(output: Path, inputs: list[list[InputFile]]) -> None:
    """Save each file's path, size and SHA-256; of a remote one the time of its last change."""
    with open_atomic(output / INPUTS_NAME) as target, ThreadPoolExecutor(os.cpu_count()) as pool:
        files = unique_files(inputs)
        for file, identity in zip(files, pool.map(identify, files), strict=True):
            entry = {"file": recorded(file.path), "size": file.size, **identity}
            target.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")


def unique_files(inputs: list[list[InputFile]]) -> list[InputFile]:
    """Return all files in order, each once."""
    return list({file.path: file for files in inputs for file in files}.values())


def identify(file: InputFile) -> dict[str, Any]:
    """Return what tells a file's content.

    Raises:
        DataError: it is no longer what it was when the work was planned.
    """
    if is_remote(file.path):
        return {"changed": file.mtime_ns}
    path = Path(file.path)
    try:
        digest = file_sha256(path)
        status = path.stat()
    except OSError:
        status = None
    if status is None or (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise DataError(f"{file.path}: changed while it was read; run again")
    return {"sha256": digest}


def changed_input(output: Path, inputs: list[list[InputFile]]) -> str | None:
    """Return the first input file that no longer holds what a finished directory was made of.

    A local file that the system has not touched since that work began is not read again.
    Directories that have no record are taken as they are.
    """
    path = output / INPUTS_NAME
    if not path.is_file():
        return None
    with path.open("rb") as lines:
        known = {entry["file"]: entry for entry in read_entries(path, lines)}
    begun = (output / CONFIG_NAME).stat().st_mtime_ns
    for file in unique_files(inputs):
        entry = known.get(recorded(file.path), {})
        if is_same(file, entry, begun):
            continue
        return redact(file.path)
    return None


def is_same(file: InputFile, entry: dict[str, Any], begun: int) -> bool:
    """Return whether a file holds what its entry says."""
    if entry.get("size") != file.size:
        return False
    if is_remote(file.path):
        return bool(entry.get("changed") == file.mtime_ns)
    status = Path(file.path).stat()
    if max(status.st_mtime_ns, status.st_ctime_ns) < begun:
        return True
    return file_sha256(Path(file.path)) == entry.get("sha256")


def read_entries(path: Path, lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    """Return the entries of the file.

    Raises:
        DataError: it is damaged.
    """
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_json(line)
            entry["file"], entry["size"]
        except (OutsideTextError, LookupError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: damaged ({error}); remove the directory, and prepare it again"
            ) from None
        yield entry
