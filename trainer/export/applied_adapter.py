"""An adapter from elsewhere on a model, for sampling: every tensor of its file has a place."""

from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.json_text import read_json_object
from headrace.trainer.export.adapter_patterns import name_modules
from headrace.trainer.export.gguf_parts import adapter_file
from headrace.trainer.model.adapter_targets import add_adapter
from headrace.trainer.model.config_limits import transformers_reads

CONFIG_NAME = "adapter_config.json"


def apply_adapter(network: Any, adapter: Path) -> Any:
    """Return the model with a LoRA adapter on it.

    Raises:
        ConfigError: an adapter of another kind, or with settings that are refused.
        DataError: its file lacks a tensor that the config calls for, or has one without a place.
    """
    file = adapter_file(adapter)
    settings = read_settings(adapter)
    name_modules(settings, [name for name, _ in network.named_modules()], adapter)
    network = add_adapter(network, settings)
    tensors = load_file(file)
    expected = get_peft_model_state_dict(network, save_embedding_layers=False)
    for name in sorted(expected.keys() - tensors.keys()):
        raise DataError(f"{adapter}: no tensor {name}, which its config calls for")
    for name in sorted(expected.keys() & tensors.keys()):
        if tensors[name].shape != expected[name].shape:
            raise DataError(
                f"{adapter}: {name} has shape {list(tensors[name].shape)}, "
                f"the model calls for {list(expected[name].shape)}"
            )
    with transformers_reads(file):
        result = set_peft_model_state_dict(network, tensors)
    for name in sorted(result.unexpected_keys):
        raise DataError(f"{adapter}: the model has no place for its tensor {name}")
    return network


def read_settings(adapter: Path) -> LoraConfig:
    """Return the adapter's config. Raises ConfigError for what is refused."""
    path = adapter / CONFIG_NAME
    values = read_json_object(path)
    if values.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type {values.get('peft_type')!r:.40}; LORA alone is read")
    with transformers_reads(path):
        settings: LoraConfig = LoraConfig.from_pretrained(str(adapter))
    settings.base_model_name_or_path = None  # nothing is asked for by its name
    settings.init_lora_weights = True
    return settings
