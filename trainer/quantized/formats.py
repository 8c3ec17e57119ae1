"""The formats that frozen weights can be held in, each a class of its own."""

from torch import Tensor

from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.quantized.fp8 import Fp8
from headrace.trainer.quantized.hqq import Hqq
from headrace.trainer.quantized.int8 import Int8
from headrace.trainer.quantized.nf4 import Fp4, Nf4
from headrace.trainer.quantized.weight import QuantizedWeight
from headrace.trainer.stored.bitsandbytes_library import bitsandbytes_functions

FORMATS: dict[str, type[QuantizedWeight]] = {
    made.kernel: made for made in (Nf4, Fp4, Int8, Hqq, Fp8)
}


def format_of(config: QuantizationConfig) -> type[QuantizedWeight]:
    """Return the format that a config asks for."""
    return FORMATS[config.type if config.backend == "bnb" else config.backend]


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
