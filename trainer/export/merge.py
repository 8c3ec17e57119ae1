"""Adapter into base model, one decoder layer at a time."""

import shutil
from pathlib import Path

from headrace.schemas.errors import ConfigError
from headrace.schemas.publish import rename_durably
from headrace.trainer.quiet import quiet_libraries


def merge(model: Path, adapter: Path, output: Path) -> None:
    """Write a Hugging Face model directory with the adapter's change added to the weights.

    The sum is formed in float32 and stored in the base model's type. No more than one layer, and
    what one file of the result holds, is in memory at once.

    Raises:
        ConfigError: a directory is missing, or the output exists.
        DataError: the adapter does not belong to the model.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(
            f"{adapter}: no adapter_config.json; give the `adapter` directory of a run"
        )
    if not (model / "config.json").is_file():
        raise ConfigError(f"{model}: no config.json; give the base model's directory")
    if output.exists():
        raise ConfigError(f"{output}: exists already; remove it or choose another --output")

    quiet_libraries()
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    from headrace.trainer.export.merged_model import write_merged

    write_merged(model, adapter, temporary)
    rename_durably(temporary, output)
