"""Half-quadratic quantization, by HQQ's own quantizer; read against HQQ 0.2.8."""

from typing import Self

import torch
from torch import Tensor, nn

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
    def check_part(
        cls, name: str, shape: torch.Size, dim: int, ranks: int, config: QuantizationConfig
    ) -> None:
        if len(shape) == 3:  # whole matrices of a stack
            return
        bits, group_size, axis = config.hqq_settings(name)
        columns = shape[1] // ranks if dim else shape.numel() // ranks
        words = HQQ_WORDS[bits] if bits != 3 else 1  # 3 bits are filled up
        if axis == 0:
            problem, remedy = "groups of {name} reach over all of it", "set quantization.axis = 1"
        elif columns % group_size:
            problem = f"parts of {{name}} have {columns} weights, no multiple of {group_size}"
            remedy = "use a smaller quantization.group_size for it"
        elif shape.numel() // ranks // group_size % words:
            problem, remedy = "parts of {name} do not fill words", "use another bits or group_size"
        else:
            return
        raise ConfigError(f"tensor_parallel = {ranks}: {problem.format(name=name)}; {remedy}")

    def part(self, dim: int, rank: int, ranks: int) -> Self:
        """Return a rank's part: groups stay those of the whole, and are packed anew."""
        shape, held, bits = list(self.shape), self.buffers_by_name, self.settings["bits"]
        shape[dim] //= ranks
        if len(self.shape) == 3:  # whole matrices of a stack
            parts = {name: value.chunk(ranks)[rank].clone() for name, value in held.items()}
            return type(self)(torch.Size(shape), parts, self.settings)
        rows = 1 if dim == 0 else self.shape[0]

        def cut(groups: Tensor) -> Tensor:
            split = groups.reshape(rows, ranks, -1, groups.shape[-1])
            return split[:, rank].reshape(-1, groups.shape[-1]).clone()

        count = held["scale"].shape[0]
        parts = {name: cut(held[name]) for name in ("scale", "zero")}
        parts["codes"] = pack_rows(cut(unpack_rows(held["codes"], bits)[:count]), bits)
        made = type(self)(torch.Size(shape), parts, self.settings)
        return self._with_row_scales(made, dim, rank, ranks)

    @classmethod
    def bits(cls, name: str, shape: torch.Size, config: QuantizationConfig) -> float:
        """Return the bits of a code and the share of scale and zero."""
        bits, group_size, axis = config.hqq_settings(name)
        check_shape(name, shape[-2:], bits, group_size, axis)
        return STORED_BITS.get(bits, bits) + 2 * SCALE_BITS / group_size


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """Return [rows, columns] of codes; words hold rows that lie a number of words apart."""
    steps = HQQ_WORDS[bits]
    shifts = [(steps - 1 - step) * bits for step in range(steps)]
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in shifts])


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Return what `unpack_rows` reads; rows are filled up with zeros to a number of words."""
    steps = HQQ_WORDS[bits]
    filled = nn.functional.pad(codes, (0, 0, 0, -len(codes) % steps))
    words = torch.zeros_like(filled[: len(filled) // steps])
    for step, part in enumerate(filled.chunk(steps)):
        words |= part << (steps - 1 - step) * bits
    return words


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
