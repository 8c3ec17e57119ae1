"""Sources of TRL's, Unsloth's and LLaMA-Factory's datasets, and the shard directories for them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.jobs.migration.imported import Imported
from headrace.jobs.trainer_arguments.llama_factory import listed
from headrace.schemas.errors import ConfigError
from headrace.schemas.outside_text import MOST_YAML_BYTES, read_text

INFO = "dataset_info.json"
ROLES = {"user": "user", "assistant": "assistant", "system": "system"}
TAGS = {"role_tag": ("from", "role"), "content_tag": ("value", "content")}
FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # of `datasets`, which say no place
WHOLE = "whole conversations are trained there; say more in `chat.train_on`"


def hub_or_file(name: str, config: str | None = None, split: str | None = None) -> str:
    """Return the path of a dataset: a file, a folder's files, or a name on the hub."""
    if "://" in name or Path(name).suffix in FILES or any(mark in name for mark in "*?"):
        return name
    if Path(name).is_dir():
        return f"{name.rstrip('/')}/**/*"
    parts = [part or "" for part in (config, split)]
    return ":".join(["hf", name, *parts]).rstrip(":")


def trl_sources(
    values: Mapping[str, Any], trainer: str, imported: Imported
) -> list[dict[str, Any]]:
    """Return the sources of TRL's arguments, or of a script's `load_dataset`."""
    kind = trl_kind(values, trainer)
    sources = []
    for number, entry in enumerate(entries(values)):
        path = trl_path(entry)
        if path is None:
            path = "data/*.jsonl"
            imported.leave("dataset_name", None, "not written; give your files in prepare.toml")
        sources.append({"name": f"data-{number + 1}", "path": path} | kind)
    held = trl_test(values)
    if held is not None:
        sources.append({"name": "test", "path": held, "split": "evaluation"} | kind)
    if kind["type"] == "chat" and not values.get("assistant_only_loss"):
        imported.leave("assistant_only_loss", False, WHOLE)
    return sources


def trl_path(entry: Mapping[str, Any]) -> str | list[str] | None:
    """Return where the rows of one `load_dataset` are, or None where it does not say."""
    files = entry.get("data_files")
    if isinstance(files, Mapping):
        files = files.get(entry.get("split") or "train") or next(iter(files.values()), None)
    if isinstance(files, str) or (isinstance(files, list) and files):
        return files
    if not entry.get("path") or entry["path"] in BUILDERS:
        return None
    return hub_or_file(str(entry["path"]), entry.get("name"), str(entry.get("split") or "train"))


def trl_test(values: Mapping[str, Any]) -> str | None:
    """Return the held-out split of the hub's dataset, if it is evaluated on."""
    strategy = str(values.get("eval_strategy", values.get("evaluation_strategy", "no")))
    if strategy == "no" or not values.get("dataset_name"):
        return None
    split = str(values.get("dataset_test_split", "test"))
    path = hub_or_file(str(values["dataset_name"]), values.get("dataset_config"), split)
    return path if path.startswith("hf:") else None


def entries(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the datasets, each as `load_dataset` takes them."""
    mixture = values.get("datasets")
    if isinstance(mixture, list):
        return [entry for entry in mixture if isinstance(entry, Mapping)]
    keys = ("path", "name", "split", "data_files")
    called = {key: values[f"load_dataset.{key}"] for key in keys if f"load_dataset.{key}" in values}
    if called:
        return [called]
    named = {"dataset_name": "path", "dataset_config": "name", "dataset_train_split": "split"}
    return [{ours: values[key] for key, ours in named.items() if values.get(key)}]


def trl_kind(values: Mapping[str, Any], trainer: str) -> dict[str, Any]:
    """Return what a source's rows are: pairs, texts of a named column, or conversations."""
    if trainer != "sft":
        return {"type": "unpaired" if trainer == "kto" else "preference"}
    if values.get("dataset_text_field"):
        return {"type": "documents", "text_field": str(values["dataset_text_field"])}
    chat = {
        "template": values.get("chat_template_path"),
        "end_of_turn": values.get("eos_token"),
    }
    given = {key: str(value) for key, value in chat.items() if value}
    return {"type": "chat"} | ({"chat": given} if given else {})


def factory_sources(values: Mapping[str, Any], config: Path) -> dict[str, dict[str, Any]]:
    """Return the source of each dataset that LLaMA-Factory's config names, by its name.

    Raises:
        ConfigError: `dataset_info.json` is not there, or has not that name.
    """
    info = dataset_info(str(values.get("dataset_dir", "data")), config)
    names = dict.fromkeys(listed(values.get("dataset")), "auto")
    names |= dict.fromkeys(listed(values.get("eval_dataset")), "evaluation")
    if not names:
        raise ConfigError(f"{config}: no dataset; name one of {INFO}")
    sources = {}
    for name, split in names.items():
        if name not in info.entries:
            raise ConfigError(f"dataset: {name!r}: not in {info.path}; add it there")
        source = info.source(name, values)
        sources[name] = source | ({"split": split} if split != "auto" else {})
    return sources


class DatasetInfo:
    """LLaMA-Factory's `dataset_info.json`."""

    def __init__(self, path: Path, entries: Mapping[str, Any]) -> None:
        self.path, self.entries = path, entries

    def source(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return one entry as a source."""
        entry = self.entries[name]
        source = {"name": name, "path": self.place(name, entry)}
        columns = entry.get("columns") or {}
        if columns.keys() & {"images", "videos", "audios"}:
            raise ConfigError(f"dataset: {name!r}: pictures and sound are not imported")
        if values.get("stage") == "pt":
            return source | {
                "type": "documents",
                "text_field": columns.get("prompt", "instruction"),
            }
        if entry.get("formatting", "alpaca") == "alpaca":
            return source | alpaca(name, entry, columns)
        return source | conversations(entry, columns, bool(values.get("train_on_prompt")))

    def place(self, name: str, entry: Mapping[str, Any]) -> str:
        """Return where an entry's rows are.

        Raises:
            ConfigError: at a place that cannot be read.
        """
        if entry.get("file_name"):
            path = self.path.parent / str(entry["file_name"])
            return f"{path}/**/*" if path.is_dir() else str(path)
        if entry.get("hf_hub_url"):
            split = str(entry.get("split") or "train")
            return hub_or_file(str(entry["hf_hub_url"]), entry.get("subset"), split)
        raise ConfigError(f"dataset: {name!r}: neither file_name nor hf_hub_url in {self.path}")


def alpaca(name: str, entry: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of rows with a question, what it is about, and an answer.

    Raises:
        ConfigError: they carry a history or a system text, which such a source has no key for.
    """
    renamed = [name for name in ("system", "tools") if columns.get(name, name) != name]
    for column in [*renamed, *(["history"] if columns.get("history") else [])]:
        raise ConfigError(
            f"dataset: {name!r}: alpaca rows with a column {columns[column]!r} of {column}; write "
            "them as messages"
        )
    given = columns or {"prompt": "instruction", "query": "input", "response": "output"}
    if columns.get("kto_tag"):
        if given.get("query"):
            raise ConfigError(
                f"dataset: {name!r}: judged answers with a second column of the question"
            )
        fields = {"prompt": given.get("prompt", "instruction"), "label": columns["kto_tag"]}
        fields["completion"] = given.get("response", "output")
        return {"type": "unpaired", "unpaired": fields | {"as_chat": True}}
    if entry.get("ranking"):
        if given.get("query") and columns:
            raise ConfigError(f"dataset: {name!r}: pairs with a second column of the question")
        pair = {key: given.get(key, key) for key in ("chosen", "rejected")}
        names = {"prompt": given.get("prompt", "instruction"), **pair, "as_chat": True}
        return {"type": "preference", "preference": names}
    chat = {"prompt": given.get("prompt"), "prompt_input": given.get("query")}
    chat["completion"] = given.get("response")
    return {"type": "chat", "chat": {key: value for key, value in chat.items() if value}}


def conversations(
    entry: Mapping[str, Any], columns: Mapping[str, Any], whole: bool
) -> dict[str, Any]:
    """Return the keys of rows with messages.

    Raises:
        ConfigError: the parts of a message have other names than rows can have.
    """
    if columns.get("kto_tag"):
        raise ConfigError("kto_tag: judged conversations; write them as prompt, completion, label")
    field = columns.get("messages", "conversations" if not columns else None)
    tags = entry.get("tags") or {}
    for tag, names in TAGS.items():
        if tags.get(tag, names[0]) not in names:
            raise ConfigError(f"tags: {tag}: {tags[tag]!r}: only {' and '.join(names)} are read")
    roles = {str(tags[f"{role}_tag"]): role for role in ROLES if tags.get(f"{role}_tag")}
    roles = {theirs: ours for theirs, ours in roles.items() if theirs != ours}
    chat: dict[str, Any] = {"field": field} if field else {}
    chat |= {"roles": roles} if roles else {}
    chat |= {"train_on": ["system", "user", "assistant"]} if whole else {}
    if entry.get("ranking"):
        pair = {key: columns.get(key, key) for key in ("chosen", "rejected")}
        return {"type": "preference", "preference": pair, "chat": chat}
    return {"type": "chat"} | ({"chat": chat} if chat else {})


def dataset_info(folder: str, config: Path) -> DatasetInfo:
    """Read `dataset_info.json`, looked for here and in the folders above the config.

    Raises:
        ConfigError: not there, or no JSON.
    """
    places = [Path(folder) / INFO, *(up / folder / INFO for up in config.resolve().parents[:4])]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ConfigError(f"dataset_dir: {folder}/{INFO}: not found; run this where it is")
    try:
        entries = json.loads(read_text(path, MOST_YAML_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not isinstance(entries, dict):
        raise ConfigError(f"{path}: no table of datasets")
    return DatasetInfo(path, entries)
