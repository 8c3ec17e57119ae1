"""Adapter into base model, one decoder layer at a time."""

import shutil
from pathlib import Path

from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.progress import Progress, silent
from headrace.trainer.export.model_card import CARD, CURVE
from headrace.trainer.export.output import check_new, new_output
from headrace.trainer.quiet import quiet_libraries


def merge(
    model: Path,
    adapter: Path,
    output: Path,
    scale: float = 1.0,
    device: str = "cpu",
    progress: Progress = silent,
) -> int:
    """Write a Hugging Face model directory with the adapter's change added to the weights.

    The sum is formed in float32 and stored in the base model's type. No more than one layer, and
    what one file of the result holds, is in memory at once.

    Args:
        scale: factor of the change; -1 takes it away from weights that hold it.
        device: where the sums are formed.

    Returns:
        How many weights were changed.

    Raises:
        ConfigError: a directory is missing, or the output exists.
        DataError: the adapter does not belong to the model.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(f"{adapter}: {why_not_an_adapter(adapter)}")
    if not (model / "config.json").is_file():
        raise ConfigError(f"{model}: no config.json; give the base model's directory")
    check_new(output)

    quiet_libraries()
    from headrace.trainer.export.merged_model import write_merged

    with new_output(output) as temporary:
        temporary.mkdir()
        count = write_merged(model, adapter, temporary, scale, device, progress)
        if not count:
            raise DataError(f"{adapter}: none of its tensors changes a weight of {model}")
        copy_card(adapter, temporary, scale)
    return count


def copy_card(adapter: Path, output: Path, scale: float) -> None:
    """The adapter's card, which says so where not all of the change was added."""
    for name in (CARD, CURVE):
        if (adapter / name).is_file():
            shutil.copy2(adapter / name, output / name)
    if scale != 1 and (output / CARD).is_file():
        with (output / CARD).open("a", encoding="utf-8") as card:
            card.write(
                f"\nMerged with a scale of {scale:g}; the losses above are of a scale of 1.\n"
            )


def why_not_an_adapter(directory: Path) -> str:
    """Explain what a directory without PEFT's config is, and what to do."""
    from headrace.trainer.adapters.control import RECORD_NAME

    if (directory / RECORD_NAME).is_file():
        return "control adapters change what layers add to the hidden states; no weight holds that"
    if (directory / "config.json").is_file():
        return "holds a whole model already, new blocks included; there is nothing to merge"
    return "no adapter_config.json; give the `adapter` directory of a run"
