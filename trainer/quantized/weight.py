"""A frozen matrix held in few bits: what all formats have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.kernels.dequantize import dequantize
from headrace.kernels.fp8_linear import fp8_linear, quantize_rows
from headrace.kernels.frozen_linear import frozen_linear
from headrace.schemas.train.quantization_config import QuantizationConfig


class QuantizedWeight(nn.Module, ABC):
    """A frozen matrix in one format, in named buffers, so that it moves with its module.

    Attributes:
        kernel: how `kernels.dequantize` calls the format.
        parts: names of the buffers that it takes, in its order; some may be absent.
        shape: of the matrix, [outputs, inputs].
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
    @abstractmethod
    def bits(cls, name: str, shape: torch.Size, config: QuantizationConfig) -> float:
        """Return the bits that a weight takes, its share of scales included.

        Raises:
            ConfigError: settings that do not go with the shape.
        """

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
        _, scales = quantize_rows(self.dequantize(torch.float32))
        self.register_buffer("row_scales", scales.squeeze(1), persistent=False)

    @property
    def in_fp8(self) -> bool:
        """Say whether products are of 8-bit floats."""
        return "row_scales" in self._buffers

    @property
    def buffers_by_name(self) -> dict[str, Tensor]:
        """Every tensor that holds a part of the matrix."""
        return {name: value for name, value in self._buffers.items() if value is not None}

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix takes."""
        return sum(value.nbytes for value in self.buffers_by_name.values())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole matrix, rounded to `dtype` once."""
        tensors, settings = self.packed
        return dequantize(tensors, self.kernel, self.shape, settings, dtype)

    def linear(self, x: Tensor, bias: Tensor | None, threshold: float | None = None) -> Tensor:
        """Return `x @ weight.T + bias`; keeps nothing dequantized for the backward pass.

        Args:
            threshold: of 8-bit integers, see `frozen_linear`; other formats have none.
        """
        tensors, settings = self.packed
        scales = self._buffers.get("row_scales")
        if scales is not None:
            return fp8_linear(x, bias, tensors, self.kernel, self.shape, settings, scales)
        return frozen_linear(x, bias, tensors, self.kernel, self.shape, settings, threshold)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [..., columns]: some rows, as an embedding looks them up."""
        return functional.embedding(ids, self.dequantize(dtype))
