"""The files of a model directory that say how its pictures are prepared."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.schemas.errors import ConfigError

EXTRA_TOKENS = ("extra_special_tokens", "model_specific_special_tokens")

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
