"""An Axolotl YAML file in place of a source: its `datasets:` as sources, its keys as ours.

Nothing in the file is ever imported or run: it is read with PyYAML's safe loader, and its types are
names that Headrace knows.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from headrace.schemas.config_errors import Location, describe, key_location
from headrace.schemas.errors import ConfigError
from headrace.schemas.outside_text import MOST_YAML_BYTES, OutsideTextError, parse_yaml, read_text
from headrace.schemas.prepare.axolotl_config import AxolotlConfig
from headrace.schemas.prepare.axolotl_files import LOADERS, find_files

logger = logging.getLogger(__name__)

SUFFIXES = (".yaml", ".yml")
BLOCKS = {"datasets": "auto", "pretraining_dataset": "auto", "test_datasets": "evaluation"}
FOR_EVERY_ENTRY = (
    "train_on_inputs",
    "min_sample_len",
    "eot_tokens",
    "chat_template",
    "chat_template_jinja",
    "chat_template_kwargs",
    "default_system_message",
)
WHERE = {"path", "name", "split", "train_on_split", "ds_type", "data_files", "preprocess_shards"}
WITHOUT_EFFECT = {  # on tokens; or on anything, in Axolotl too
    "field_human",
    "field_model",
    "input_format",
    "input_transform",
    "logprobs_field",
    "revision",
    "temperature",
    "trust_remote_code",
}
PREFERENCES = ("dpo", "ipo", "simpo", "orpo", "kto")
NO_PREFERENCES = {
    "grpo": "makes its answers while it trains",
}
REFUSED = {
    "added_tokens_overrides": "rewrites the tokenizer's files; rename the tokens in tokenizer.json "
    "itself, and remove the key",
}
OTHER_TOKENIZER = "tokenizer_use_mistral_common"


def expand_axolotl(values: Mapping[str, Any]) -> dict[str, Any]:
    """Unchecked config values with sources in place of each YAML file, and with the keys it fills.

    What both configs name must agree; what only the YAML names, or has a default for, is filled in.

    Raises:
        ConfigError: a file that cannot be read, a key that is not known or cannot be followed.
    """
    sources = values.get("sources")
    if not isinstance(sources, list) or not any(map(is_yaml, sources)):
        return dict(values)
    result = dict(values)
    expanded: list[Any] = []
    for source in sources:
        if is_yaml(source):
            file = AxolotlFile(source["path"])
            expanded += file.sources(source)
            file.fill(result, values)
        else:
            expanded.append(source)
    return result | {"sources": expanded}


def is_yaml(source: Any) -> bool:
    """Return whether an unchecked source is an Axolotl YAML file."""
    if not isinstance(source, dict) or source.get("type") != "axolotl":
        return False
    path = source.get("path")
    return isinstance(path, str) and path.lower().endswith(SUFFIXES)


class AxolotlFile:
    """One YAML file."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.values, self.tree = parse_yaml(read_text(Path(path), MOST_YAML_BYTES))
        except OutsideTextError as error:
            line = f":{error.line}" if error.line else ""
            raise ConfigError(f"{path}{line}: {error}") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from None
        if not isinstance(self.values, dict):
            raise ConfigError(f"{path}: not an Axolotl config; it must hold keys and values")
        if self.values.get(OTHER_TOKENIZER):
            logger.warning(
                "%s: %s: texts are tokenized by tokenizer.json, which may differ",
                path,
                OTHER_TOKENIZER,
            )
        for key, reason in REFUSED.items():
            if self.values.get(key):
                raise self.error((key,), f"{key} {reason}")

    def error(self, location: Location, message: str) -> ConfigError:
        """An error at a key of the file."""
        node = self.tree
        line = None
        for part in location:
            found = child_of(node, part)
            if found is None:
                break
            line, node = found
        return ConfigError(f"{self.path}{f':{line}' if line else ''}: {message}")

    def sources(self, base: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The sources that the file names, with the other keys of the source that named it."""
        if base.get("axolotl"):
            raise ConfigError(
                f'source "{base.get("name")}": its options stand in {self.path}; '
                "remove [sources.axolotl]"
            )
        found: list[dict[str, Any]] = []
        for location, entry, split in self.entries():
            for files, rows in self.places(location, entry):
                kept = {key: value for key, value in base.items() if key != "path"}
                options = self.options(location, entry, base.get("engine") == "axolotl")
                own = {"type": "axolotl", "axolotl": options | ({"rows": rows} if rows else {})}
                if "type" not in options:
                    own = {"type": "pretokenized"}
                if (loader := self.loader(location, entry)) in ("csv", "parquet", "arrow", "text"):
                    own["format"] = loader
                found.append(
                    kept
                    | own
                    | {
                        "path": files,
                        "split": base.get("split", "auto") if split == "auto" else split,
                    }
                )
        if not found:
            raise ConfigError(f"{self.path}: no datasets; name them under datasets:")
        for number, source in enumerate(found, start=1):
            source["name"] = base.get("name") if len(found) == 1 else f"{base.get('name')}-{number}"
        return found

    def entries(self) -> Iterator[tuple[Location, dict[str, Any], str]]:
        """Each dataset entry, with its place in the file and the split its rows go to."""
        for block, split in BLOCKS.items():
            entries = self.values.get(block) or []
            if isinstance(entries, str):
                entries = [{"path": entries}]
            if not isinstance(entries, list):
                raise self.error((block,), f"{block} must be a list of entries")
            for number, entry in enumerate(entries):
                location = (block, number)
                if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                    raise self.error(location, f"{block}.{number} has no path")
                if block == "pretraining_dataset":
                    entry = {"type": "pretrain"} | without_nulls(entry)
                yield location, without_nulls(entry), split

    def options(
        self, location: Location, entry: Mapping[str, Any], any_key: bool
    ) -> dict[str, Any]:
        """The entry's options and the top-level keys that concern it, checked.

        Args:
            any_key: keep keys that are not known, for Axolotl itself to read.
        """
        top = without_nulls({key: self.values.get(key) for key in FOR_EVERY_ENTRY})
        own = {key: value for key, value in entry.items() if key not in WHERE | WITHOUT_EFFECT}
        own.pop("skip", None)
        if own.get("chat_template") == "tokenizer_default":
            own.pop("chat_template")  # Axolotl gives the tokenizer the template of the whole file
        if "chat_template" in own or "chat_template_jinja" in own:
            for key in ("chat_template", "chat_template_jinja"):
                top.pop(key, None)
        rl = self.values.get("rl")
        if rl is not None and rl not in PREFERENCES:
            reason = NO_PREFERENCES.get(rl, "is not supported")
            raise self.error(("rl",), f'rl: "{rl}" {reason}; it may be {", ".join(PREFERENCES)}')
        extra: dict[str, Any] = {}
        if self.values.get("sample_packing") and rl is None:
            extra["drop_untrained"] = True
        if str(self.values.get("excess_length_strategy")).lower() == "raise":
            extra["raise_on_long"] = True
        if rl is not None:
            extra |= {"rl": rl, "type": own.get("type", "passthrough")}
        if any_key:
            extra["options"] = {
                key: own.pop(key) for key in list(own) if key not in AxolotlConfig.model_fields
            }
        merged = top | own | extra
        if "type" not in merged:
            return {}
        try:
            return AxolotlConfig.model_validate(merged).model_dump(exclude_unset=True)
        except ValidationError as error:
            detail = error.errors()[0]
            place = key_location(AxolotlConfig, detail["loc"])
            message = describe(AxolotlConfig, place, detail)
            raise self.error((*location, *place), message) from None

    def places(
        self, location: Location, entry: Mapping[str, Any]
    ) -> Iterator[tuple[list[str], str | None]]:
        """Files of an entry, and which of their rows: once for each name of a list of names."""
        names = entry.get("name")
        for name in names if isinstance(names, list) else [names]:
            split = str(entry.get("split") or entry.get("train_on_split") or "")
            word, _, rows = split.partition("[")
            skip = entry.get("skip")
            slice_text = f"[{rows}" if rows else f"[{skip}:]" if skip else None
            yield self.files(location, entry, name, word), slice_text

    def loader(self, location: Location, entry: Mapping[str, Any]) -> str | None:
        """The kind of file that an entry names; None: by the files' names."""
        named = entry["path"] if entry["path"] in LOADERS else None
        loader = entry.get("ds_type") or named
        if loader is None and entry["path"].endswith(".txt"):
            loader = "text"
        if loader == "text" and "type" not in entry and location[0] != "pretraining_dataset":
            raise self.error(location, "lines of text have no token ids; set type: completion")
        return loader

    def files(
        self, location: Location, entry: Mapping[str, Any], name: object, split: str
    ) -> list[str]:
        """The paths or globs of an entry."""
        found = find_files(entry, name, split)
        if found is None:
            raise self.error(
                (*location, "path"),
                f'path: "{entry["path"]}" is neither a file nor a directory here; download the '
                "dataset, and give its path",
            )
        return found

    def fill(self, result: dict[str, Any], given: Mapping[str, Any]) -> None:
        """Put the file's keys for the whole set into config values, where nothing else stands."""
        for key, (value, names) in self.settings().items():
            explicit = any(name in self.values and self.values[name] is not None for name in names)
            if key in given and explicit and given[key] != value:
                raise self.error(
                    (names[0],),
                    f"{names[0]} asks for {key} = {value!r}, but the config has {given[key]!r}; "
                    "remove one of them",
                )
            if result.get(key, value) != value and key not in given:
                raise self.error(
                    (names[0],), f"{names[0]} differs from what another YAML source asks for"
                )
            result.setdefault(key, value)
        if result.get("packing") == "concatenate" and "overlong" not in given:
            result.pop("overlong", None)  # such rows cut every document

    def settings(self) -> dict[str, tuple[Any, tuple[str, ...]]]:
        """Our keys with the values that the file asks for, and its own keys that do."""
        values = self.values
        pairs = values.get("rl") is not None
        packing = "best_fit" if values.get("sample_packing") and not pairs else "none"
        long = str(values.get("excess_length_strategy") or "drop").lower()
        found: dict[str, tuple[Any, tuple[str, ...]]] = {
            "sequence_len": (values.get("sequence_len") or 512, ("sequence_len",)),
            "packing": (packing, ("sample_packing",)),
            "overlong": ("truncate" if long == "truncate" else "drop", ("excess_length_strategy",)),
        }
        size = self.evaluation_size()
        key = "evaluation_documents" if size >= 1 else "evaluation_fraction"
        found[key] = (size, ("val_set_size",))
        if values.get("seed") is not None:
            found["seed"] = (values["seed"], ("seed",))
        special = without_nulls(values.get("special_tokens") or {})
        tokens = list(values.get("tokens") or []) + special.pop("additional_special_tokens", [])
        if special:
            found["special_tokens"] = (special, ("special_tokens",))
        if tokens:
            found["added_tokens"] = (tokens, ("tokens", "special_tokens"))
        if values.get("dataset_exact_deduplication"):
            found["deduplicate"] = ({"exact": True}, ("dataset_exact_deduplication",))
        return found

    def evaluation_size(self) -> float | int:
        """`val_set_size`: a share below 1, or a number of rows."""
        size = self.values.get("val_set_size") or 0
        if not isinstance(size, int | float) or size < 0 or (size >= 1 and size != int(size)):
            raise self.error(
                ("val_set_size",),
                f"val_set_size: {size} is neither a share, such as 0.01, nor a number of rows",
            )
        return int(size) if size >= 1 else float(size)


def child_of(node: Any, part: str | int) -> tuple[int, Any] | None:
    """The line and node of a key or entry, or None."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == part:
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line + 1, node.value[part]
    return None


def without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that have a value; Axolotl drops empty ones."""
    return {key: value for key, value in values.items() if value is not None}
