"""A frozen matrix, or a stack of them, held in few bits: what all formats have in common."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from headrace.kernels.dequantize import dequantize
from headrace.kernels.experts.fp8_grouped_linear import fp8_grouped_linear
from headrace.kernels.experts.grouped_linear import frozen_grouped_linear
from headrace.kernels.fp8.linear import fp8_linear
from headrace.kernels.fp8.rows import quantize_rows
from headrace.kernels.frozen_linear import frozen_linear
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.quantized.frozen_weight import FrozenWeight

SCALE_BITS = 32  # of a scale in float32


class QuantizedWeight(FrozenWeight):
    """A frozen matrix in one format, in named buffers, so that it moves with its module.

    A stack is several matrices of one shape, such as those of all experts.

    Attributes:
        kernel: how `kernels.dequantize` calls the format.
        parts: names of the buffers that it takes, in its order; some may be absent.
        shape: of the matrix, [outputs, inputs], or of the stack, [matrices, outputs, inputs].
        settings: whole numbers that the format needs to read its buffers.
    """

    kernel: str
    parts: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]] = ()  # whose versions decide on the bits, beside torch

    def __init__(
        self, shape: torch.Size, buffers: Mapping[str, Tensor | None], settings: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.settings = dict(settings)
        for name, value in buffers.items():
            if value is not None:
                self.register_buffer(name, value, persistent=False)

    @classmethod
    @abstractmethod
    def make(cls, value: Tensor, name: str, config: QuantizationConfig, dtype: torch.dtype) -> Self:
        """Quantize a matrix where it lies.

        Args:
            name: of the weight, which may have settings of its own.
            dtype: of the computation.
        """

    @classmethod
    def make_stack(
        cls, value: Tensor, name: str, config: QuantizationConfig, dtype: torch.dtype
    ) -> Self:
        """Quantize a stack where it lies, each matrix by itself."""
        return cls.stacked([cls.make(matrix, name, config, dtype) for matrix in value])

    @classmethod
    def stacked(cls, matrices: Sequence[Self]) -> Self:
        """Return a stack of matrices of one shape and the same settings."""
        parts = [matrix.buffers_by_name for matrix in matrices]
        buffers = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        shape = torch.Size([len(matrices), *matrices[0].shape])
        return cls(shape, buffers, matrices[0].settings)

    @classmethod
    @abstractmethod
    def bits(cls, name: str, shape: torch.Size, config: QuantizationConfig) -> float:
        """Return the bits that a weight takes, its share of scales included.

        Raises:
            ConfigError: settings that do not go with the shape.
        """

    @classmethod
    def product_bits(cls, shape: torch.Size) -> float:
        """Return what 8-bit products add to the bits of a weight: a scale for each row."""
        return SCALE_BITS / shape[-1]

    @classmethod
    def check_part(
        cls, name: str, shape: torch.Size, dim: int, ranks: int, config: QuantizationConfig
    ) -> None:
        """Check that each of some ranks can hold its part of a dimension of a weight, as it can
        where every row has a scale.

        Raises:
            ConfigError: naming the weight.
        """

    def part(self, dim: int, rank: int, ranks: int) -> Self:
        """Return a rank's part of a format with a scale for each row: codes and scales of its rows,
        or of its inputs the codes and all scales.
        """
        shape = list(self.shape)
        shape[dim] //= ranks
        held = self.buffers_by_name.items()
        parts = {name: self._part_of_rows(value, dim, rank, ranks) for name, value in held}
        return type(self)(torch.Size(shape), parts, self.settings)

    def _part_of_rows(self, value: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
        """Return a rank's part of codes, or of numbers of which each row has one."""
        if dim >= value.ndim:
            return value.clone()
        size = value.shape[dim] // ranks
        return value.narrow(dim, rank * size, size).clone()

    def _with_row_scales(self, part: Self, dim: int, rank: int, ranks: int) -> Self:
        """Give a part its rows' scales where products are of 8-bit floats."""
        scales = self._buffers.get("row_scales")
        if scales is not None:
            own = self._part_of_rows(scales, dim, rank, ranks)
            part.register_buffer("row_scales", own, persistent=False)
        return part

    @property
    def packed(self) -> tuple[list[Tensor], list[int]]:
        """Tensors and settings as `kernels.dequantize` takes them."""
        return self.kernel_tensors(), list(self.settings.values())

    def kernel_tensors(self) -> list[Tensor]:
        """Return the buffers that are there, in the order of `parts`."""
        found = [self._buffers.get(name) for name in self.parts]
        return [part for part in found if part is not None]

    def multiply_in_fp8(self) -> None:
        """Let products be of 8-bit floats, by scales of this matrix's rows."""
        matrices = self.dequantize(torch.float32).view(-1, *self.shape[-2:])
        scales = torch.stack([quantize_rows(matrix)[1] for matrix in matrices])
        self.register_buffer("row_scales", scales.view(self.shape[:-1]), persistent=False)

    @property
    def product_scales(self) -> Tensor | None:
        """Scales of the rows where products are of 8-bit floats, else None."""
        return self._buffers.get("row_scales")

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        tensors, settings = self.packed
        return dequantize(tensors, self.kernel, self.shape, settings, dtype)

    def linear(self, x: Tensor, bias: Tensor | None, threshold: float | None = None) -> Tensor:
        tensors, settings = self.packed
        scales = self.product_scales
        if scales is not None:
            return fp8_linear(x, bias, tensors, self.kernel, self.shape, settings, scales)
        return frozen_linear(x, bias, tensors, self.kernel, self.shape, settings, threshold)

    def grouped_linear(self, x: Tensor, groups: Tensor, offsets: Tensor) -> Tensor:
        tensors, settings = self.packed
        scales = self.product_scales
        if scales is None:
            return frozen_grouped_linear(x, offsets, tensors, self.kernel, self.shape, settings)
        return fp8_grouped_linear(
            x, groups, offsets, tensors, self.kernel, self.shape, settings, scales
        )
