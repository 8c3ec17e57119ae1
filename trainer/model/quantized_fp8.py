"""8-bit floats (e4m3) with a scale for each output channel, multiplied as such."""

from typing import Self

import torch
from torch import Tensor

from headrace.kernels.fp8_linear import ALIGNMENT, fp8_linear, quantize_rows
from headrace.schemas.errors import ConfigError
from headrace.schemas.quantization_config import QuantizationConfig
from headrace.trainer.model.quantized_weight import QuantizedWeight

SCALE_BITS = 32


class Fp8(QuantizedWeight):
    """Codes, [outputs, inputs] in e4m3, and the scale of each row."""

    kernel = "fp8"

    @classmethod
    def make(cls, value: Tensor, name: str, config: QuantizationConfig, dtype: torch.dtype) -> Self:
        """Quantize a matrix where it lies."""
        check_shape(name, value.shape)
        codes, scales = quantize_rows(value.detach())
        return cls(value.shape, {"codes": codes, "scales": scales.squeeze(1)}, {})

    @classmethod
    def bits(cls, name: str, shape: torch.Size, config: QuantizationConfig) -> float:
        """Return 8 and the share of the scales."""
        check_shape(name, shape)
        return 8 + SCALE_BITS / shape[-1]

    @property
    def packed(self) -> tuple[list[Tensor], list[int]]:
        """Codes and scales."""
        return list(self.buffers_by_name.values()), []

    def linear(self, x: Tensor, bias: Tensor | None, threshold: float | None = None) -> Tensor:
        """Return `x @ weight.T + bias`, x quantized row by row and multiplied in 8-bit floats."""
        codes, scales = self.packed[0]
        return fp8_linear(x, codes, scales, bias)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows, dequantized alone."""
        codes, scales = (part[ids] for part in self.packed[0])
        return (codes.float() * scales.unsqueeze(-1)).to(dtype)


def check_shape(name: str, shape: torch.Size) -> None:
    """Check that the matrix units can multiply with a weight of this shape.

    Raises:
        ConfigError: naming the weight.
    """
    if any(size % ALIGNMENT for size in shape[-2:]):
        raise ConfigError(
            f'quantization.backend = "fp8": {name} is {" x ".join(map(str, shape[-2:]))}, which '
            f"are not multiples of {ALIGNMENT}; add it to skip_modules"
        )
