"""The files of a model directory that say how its pictures are prepared."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.schemas.errors import ConfigError
from headrace.schemas.json_text import parse_json
from headrace.schemas.named_files import read_regular

IMAGE_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
NESTED = "image_processor"  # in processor_config.json, as transformers 5 writes it
EXTRA_TOKENS = ("extra_special_tokens", "model_specific_special_tokens")
MAX_BYTES = 1 << 26

Values = Mapping[str, Any]


@dataclass(frozen=True)
class ProcessorFiles:
    """The tables in a model directory: of its image processor, processor, the model itself and its
    tokenizer.
    """

    directory: Path
    image: Values
    processor: Values
    config: Values
    tokenizer: Values

    def token(self, name: str, default: str) -> str:
        """Return the text of a token that the tokenizer's files may name."""
        extra = [self.tokenizer.get(key) for key in EXTRA_TOKENS]
        for values in (self.tokenizer, *(table for table in extra if isinstance(table, dict))):
            found = values.get(name)
            text = found.get("content") if isinstance(found, dict) else found
            if isinstance(text, str) and text:
                return text
        return default

    def refuse(self, what: str) -> ConfigError:
        """Return the error of a processor that cannot be followed."""
        return ConfigError(f"{self.directory}: {what}")


def read_files(directory: Path) -> ProcessorFiles:
    """Read the files of a model directory.

    Raises:
        ConfigError: it has no image processor, or no config.
        DataError: a file is damaged.
    """
    processor = read_table(directory / PROCESSOR_FILE)
    nested = processor.get(NESTED)
    image = nested if isinstance(nested, dict) else read_table(directory / IMAGE_FILE)
    config = read_table(directory / "config.json")
    for name, values in ((IMAGE_FILE, image), ("config.json", config)):
        if not values:
            raise ConfigError(
                f"{directory / name}: not found; name the directory of a vision-language model, "
                "with its processor's files"
            )
    tokenizer = read_table(directory / "tokenizer_config.json")
    return ProcessorFiles(directory, image, processor, config, tokenizer)


def read_table(path: Path) -> dict[str, Any]:
    """Return the table in a JSON file; empty where there is no file, or no table in it."""
    if not path.exists():
        return {}
    values = parse_json(read_regular(path, MAX_BYTES), path, "; fetch the model again")
    return values if isinstance(values, dict) else {}
