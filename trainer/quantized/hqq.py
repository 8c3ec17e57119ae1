"""Half-quadratic quantization, by HQQ's own quantizer; read against HQQ 0.2.8."""

from typing import Self

import torch
from torch import Tensor

from headrace.kernels.dequantize import HQQ_WORDS
from headrace.schemas.errors import ConfigError
from headrace.schemas.train.quantization_config import QuantizationConfig, check_installed
from headrace.trainer.quantized.weight import QuantizedWeight

SCALE_BITS = 16.0  # scales and zeros lie in the type of the computation
STORED_BITS = {3: 3.2}  # ten in a word of 32


class Hqq(QuantizedWeight):
    """Packed codes of 1 to 8 bits, with a scale and a zero for each group of weights."""

    kernel = "hqq"
    parts = ("codes", "scale", "zero")
    packages = ("hqq",)

    @classmethod
    def make(cls, value: Tensor, name: str, config: QuantizationConfig, dtype: torch.dtype) -> Self:
        """Quantize a matrix where it lies, with the settings of its name."""
        check_installed("hqq")
        from hqq.core.quantize import Quantizer

        bits, group_size, axis = config.hqq_settings(name)
        check_shape(name, value.shape, bits, group_size, axis)
        value = value.detach()
        packed, made = Quantizer.quantize(
            value, nbits=bits, group_size=group_size, axis=axis, device=str(value.device)
        )
        buffers = {
            "codes": packed,
            "scale": made["scale"].to(dtype),
            "zero": made["zero"].to(dtype),
        }
        # clones, because HQQ's are made in inference mode and may not meet autograd
        buffers = {
            key: part.clone(memory_format=torch.contiguous_format) for key, part in buffers.items()
        }
        return cls(value.shape, buffers, {"bits": bits, "axis": axis})

    @classmethod
    def bits(cls, name: str, shape: torch.Size, config: QuantizationConfig) -> float:
        """Return the bits of a code and the share of scale and zero."""
        bits, group_size, axis = config.hqq_settings(name)
        check_shape(name, shape[-2:], bits, group_size, axis)
        return STORED_BITS.get(bits, bits) + 2 * SCALE_BITS / group_size


def check_shape(name: str, shape: torch.Size, bits: int, group_size: int, axis: int) -> None:
    """Check that groups fill the matrix, and rows of groups the words that they are packed in.

    Raises:
        ConfigError: naming the weight.
    """
    numel, words = shape.numel(), HQQ_WORDS[bits] if bits != 3 else 1  # 3 bits are filled up
    if numel % group_size:
        raise ConfigError(
            f"quantization.group_size = {group_size} does not divide the {numel} weights of {name}"
        )
    rows = group_size if axis == 0 else numel // group_size
    if rows % words:
        raise ConfigError(
            f"quantization: {name} has {rows} rows of groups, which {bits} bits pack by {words}; "
            "use another group_size or axis for it, or skip_modules"
        )
