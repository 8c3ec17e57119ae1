"""The interface of a frozen matrix that is held in few bits, as the modules that use it see it."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class FrozenWeight(nn.Module, ABC):
    """A frozen matrix, [outputs, inputs], or a stack of them, [matrices, outputs, inputs].

    Its tensors are buffers, so that it moves with the module that holds it. The formats are in
    `headrace.trainer.quantized`, over `QuantizedWeight`.
    """

    shape: torch.Size

    @property
    def buffers_by_name(self) -> dict[str, Tensor]:
        """Every tensor that holds a part of the matrix."""
        return {name: value for name, value in self._buffers.items() if value is not None}

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix takes."""
        return sum(value.nbytes for value in self.buffers_by_name.values())

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole matrix, rounded to `dtype` once."""

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None, threshold: float | None = None) -> Tensor:
        """Return `x @ weight.T + bias`; keeps nothing dequantized for the backward pass.

        Args:
            threshold: of 8-bit integers, see `frozen_linear`; other formats have none.
        """

    @abstractmethod
    def grouped_linear(self, x: Tensor, groups: Tensor, offsets: Tensor) -> Tensor:
        """Return each row of x times the transpose of its matrix, of a stack.

        Args:
            x: [rows, inputs], sorted by group.
            groups: [rows], the matrix of each; offsets: [matrices], where each one's rows end.
        """

    @abstractmethod
    def part(self, dim: int, rank: int, ranks: int) -> "FrozenWeight":
        """Return a rank's part of a dimension that the ranks divide, with the bits of the whole."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [..., columns]: some rows, as an embedding looks them up."""
        return functional.embedding(ids, self.dequantize(dtype))


class Cut(Protocol):
    """A dimension of a weight that ranks share, as `tensor_parallel` has it."""

    @property
    def dim(self) -> int: ...

    @property
    def ranks(self) -> int: ...


class Quantizer(Protocol):
    """Rules by which a model's frozen weights are quantized."""

    @property
    def stored(self) -> frozenset[str] | None:
        """Return the weights that the model's files hold so already; None: at loading."""

    def make(self, value: Tensor, name: str, dtype: torch.dtype) -> FrozenWeight:
        """Quantize a matrix, or a stack of experts' matrices, where it lies."""

    def check_part(self, name: str, shape: torch.Size, cut: Cut) -> None:
        """Check that ranks can hold their parts of a weight.

        Raises:
            ConfigError: naming it.
        """

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type of the computation, given that of the run."""
