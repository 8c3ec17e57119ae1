"""An adapter from elsewhere on a model, for sampling: every tensor of its file has a place."""

from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from headrace.schemas.errors import DataError
from headrace.trainer.adapters.patterns import name_modules
from headrace.trainer.adapters.peft_settings import read_peft_settings
from headrace.trainer.adapters.wrapping import add_adapter
from headrace.trainer.architecture.config_limits import transformers_reads
from headrace.trainer.architecture.weight_index import adapter_file


def apply_adapter(network: Any, adapter: Path) -> Any:
    """Return the model with a LoRA adapter on it.

    Raises:
        ConfigError: an adapter of another kind, or with settings that are refused.
        DataError: its file lacks a tensor that the config calls for, or has one without a place.
    """
    file = adapter_file(adapter)
    settings = read_peft_settings(adapter)
    modules = [name for name, _ in network.named_modules()]
    parameters = [name for name, _ in network.named_parameters()]
    name_modules(settings, modules, adapter, parameters)
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
