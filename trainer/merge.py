"""Adapter into base model."""

import shutil
from pathlib import Path

from headrace.schemas.errors import ConfigError
from headrace.schemas.publish import rename_durably
from headrace.trainer.quiet import quiet_libraries


def merge(model: Path, adapter: Path, output: Path) -> None:
    """Write a Hugging Face model directory with the adapter's change added to the weights.

    The sum is formed in float32 and stored in the base model's type.

    Raises:
        ConfigError: a directory is missing, or the output exists.
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

    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    stored = (
        getattr(AutoConfig.from_pretrained(model, local_files_only=True), "dtype", None)
        or torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    merged.to(stored).save_pretrained(temporary)
    AutoTokenizer.from_pretrained(model, local_files_only=True).save_pretrained(temporary)
    rename_durably(temporary, output)
