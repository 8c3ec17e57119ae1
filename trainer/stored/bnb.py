"""Weights that bitsandbytes has quantized, as `save_pretrained` of transformers writes them.

Read against bitsandbytes 0.50.2.
"""

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from headrace.trainer.architecture.model_files import StoredTensor
from headrace.trainer.stored.bitsandbytes_library import bitsandbytes_functions
from headrace.trainer.stored.stored_weight import Parts, StoredFormat, StoredWeight

INT8_SCALES = "SCB"
# what transformers saves beside a weight of 4 bits
FOUR_BIT = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)


class Bnb(StoredFormat):
    """`bitsandbytes`: NF4, FP4 and INT8."""

    def weights(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredWeight]:
        """Return codes with what belongs to them; the codes themselves are the part ""."""
        found = {name: companions(name, tensors) for name in tensors if name.endswith("weight")}
        return {
            name: StoredWeight({"": name, **others}, dequantize)
            for name, others in found.items()
            if others
        }


def dequantize(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Return a weight as bitsandbytes dequantizes it: 4 bits by way of the type it was made of."""
    functions = bitsandbytes_functions()
    codes, others = parts[""], {key: value for key, value in parts.items() if key}
    value: Tensor
    if INT8_SCALES in others:
        value = functions.int8_vectorwise_dequant(codes, others[INT8_SCALES])
    else:
        state = functions.QuantState.from_dict(others, codes.device)
        value = functions.dequantize_4bit(codes, state)
    return value.to(dtype)


def companions(name: str, files: Container[str]) -> dict[str, str]:
    """Return what belongs to a stored weight: name in bitsandbytes' terms -> name in the files.

    Empty for weights that are not quantized.
    """
    found = {key: f"{name}.{key}" for key in FOUR_BIT if f"{name}.{key}" in files}
    scales = f"{name.removesuffix('weight')}{INT8_SCALES}"
    return found | ({INT8_SCALES: scales} if scales in files else {})
