"""8-bit integers of bitsandbytes, with a scale for each row."""

from typing import Self

import torch
from torch import Tensor

from headrace.kernels.dequantize import dequantize
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.quantized.weight import SCALE_BITS, QuantizedWeight
from headrace.trainer.stored.bitsandbytes_library import bitsandbytes_functions

LARGEST_CODE = 127


class Int8(QuantizedWeight):
    """Codes and the largest magnitude of each row."""

    kernel = "int8"
    parts = ("codes", "magnitudes")
    packages = ("bitsandbytes",)

    @classmethod
    def make(cls, value: Tensor, name: str, config: QuantizationConfig, dtype: torch.dtype) -> Self:
        """Quantize a matrix as bitsandbytes does, from half precision."""
        functions = bitsandbytes_functions()
        half = value.detach().to(torch.float16, copy=True)
        codes, magnitudes, _ = functions.int8_vectorwise_quant(half)
        return cls.of(codes, magnitudes)

    @classmethod
    def of(cls, codes: Tensor, magnitudes: Tensor) -> Self:
        """Return a weight of codes, [outputs, inputs], and the largest magnitude of each row."""
        buffers = {"codes": codes, "magnitudes": magnitudes}
        return cls(codes.shape, buffers, {"largest_code": LARGEST_CODE})

    @classmethod
    def bits(cls, name: str, shape: torch.Size, config: QuantizationConfig) -> float:
        """Return 8 and the share of the scales."""
        return 8 + SCALE_BITS / shape[-1]

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows, dequantized alone."""
        picked = [part[ids.flatten()] for part in self.packed[0]]
        shape = (ids.numel(), self.shape[1])
        return dequantize(picked, self.kernel, shape, [LARGEST_CODE], dtype).view(*ids.shape, -1)
