"""The formats that frozen weights can be held in, each a class of its own."""

import importlib

from torch import Tensor

from headrace.schemas.train.quantization_config import BACKENDS, QuantizationConfig
from headrace.trainer.quantized.int8 import Int8
from headrace.trainer.quantized.nf4 import Nf4
from headrace.trainer.quantized.weight import QuantizedWeight
from headrace.trainer.stored.bitsandbytes_library import bitsandbytes_functions


def load(factory: str) -> type[QuantizedWeight]:
    """Return the class that a record names."""
    module, _, name = factory.partition(":")
    found: type[QuantizedWeight] = getattr(importlib.import_module(module), name)
    return found


FORMATS: dict[str, type[QuantizedWeight]] = {
    made.kernel: made for record in BACKENDS.values() for made in map(load, record.formats.values())
}


def format_of(config: QuantizationConfig) -> type[QuantizedWeight]:
    """Return the format that a config asks for."""
    formats = config.record.formats
    return load(formats[config.type if config.type in formats else ""])


def restore(tensors: dict[str, Tensor]) -> QuantizedWeight:
    """Return a weight as transformers saves it after bitsandbytes.

    Args:
        tensors: by what follows the weight's name in the file: "" for the codes themselves, "SCB",
            "absmax", "quant_state.bitsandbytes__nf4" ...
    """
    functions = bitsandbytes_functions()
    codes = tensors.pop("")
    if "SCB" in tensors:
        return Int8.of(codes, tensors["SCB"])
    state = functions.QuantState.from_dict(tensors, codes.device)
    weight = FORMATS[state.quant_type]
    assert issubclass(weight, Nf4)
    return weight.from_state(codes, state)
