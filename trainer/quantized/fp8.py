"""8-bit floats (e4m3) with a scale for each output channel, multiplied as such."""

from typing import Self

import torch
from torch import Tensor

from headrace.kernels.fp8.rows import quantize_rows
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.quantized.weight import SCALE_BITS, QuantizedWeight


class Fp8(QuantizedWeight):
    """Codes, [outputs, inputs] in e4m3, and the scale of each row."""

    kernel = "fp8"
    parts = ("codes", "scales")

    @classmethod
    def make(cls, value: Tensor, name: str, config: QuantizationConfig, dtype: torch.dtype) -> Self:
        """Quantize a matrix where it lies."""
        codes, scales = quantize_rows(value.detach())
        return cls(value.shape, {"codes": codes, "scales": scales.squeeze(1)}, {})

    @classmethod
    def bits(cls, name: str, shape: torch.Size, config: QuantizationConfig) -> float:
        """Return 8 and the share of the scales."""
        return 8 + SCALE_BITS / shape[-1]

    @classmethod
    def product_bits(cls, shape: torch.Size) -> float:
        """Return 0: the scales are there already."""
        return 0.0

    @property
    def product_scales(self) -> Tensor:
        """The scales that the codes have anyway."""
        scales = self._buffers["scales"]
        assert scales is not None
        return scales

    def multiply_in_fp8(self) -> None:
        """Leave everything as it is: products are of 8-bit floats."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows, dequantized alone."""
        codes, scales = (part[ids] for part in self.packed[0])
        return (codes.float() * scales.unsqueeze(-1)).to(dtype)
