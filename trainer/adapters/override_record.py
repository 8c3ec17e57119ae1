"""The record beside an adapter of what the model under it must have."""

import json
from pathlib import Path

from pydantic import ValidationError

from headrace.schemas.errors import DataError
from headrace.schemas.json_text import read_json_object
from headrace.schemas.publish import write_atomic
from headrace.schemas.train.model_overrides import ModelOverrides

RECORD_NAME = "model_overrides.json"


def write_overrides(directory: Path, overrides: ModelOverrides) -> None:
    """Write a record of what the model under an adapter must have, if that is not its own."""
    if overrides != ModelOverrides():
        text = json.dumps(overrides.model_dump(exclude_none=True, exclude_defaults=True), indent=1)
        write_atomic(directory / RECORD_NAME, text + "\n")


def read_overrides(adapter: Path) -> ModelOverrides:
    """Read the record beside an adapter; nothing differs where there is none.

    Raises:
        DataError: it is damaged.
    """
    path = adapter / RECORD_NAME
    if not path.is_file():
        return ModelOverrides()
    try:
        return ModelOverrides.model_validate(read_json_object(path))
    except ValidationError as error:
        raise DataError(f"{path}: {error.errors()[0]['msg']}; fetch the adapter again") from None
