"""A quantized weight as a module holds it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.kernels.dequantize import dequantize
from headrace.kernels.frozen_linear import frozen_linear


class QuantizedWeight(nn.Module):
    """A frozen matrix in quantized form; buffers, so that it moves with its module.

    Args:
        parts, kind, shape, settings: see `kernels.dequantize.dequantize`.
    """

    def __init__(
        self, parts: Sequence[Tensor], kind: str, shape: Sequence[int], settings: Sequence[int]
    ) -> None:
        super().__init__()
        self.kind = kind
        self.shape = torch.Size(shape)
        self.settings = list(settings)
        for number, part in enumerate(parts):
            self.register_buffer(f"part_{number}", part, persistent=False)

    @property
    def parts(self) -> list[Tensor]:
        return [part for part in self._buffers.values() if part is not None]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix."""
        return dequantize(self.packed, self.kind, self.shape, self.settings, dtype)

    def linear(self, x: Tensor, bias: Tensor | None, threshold: float | None = None) -> Tensor:
        """`x @ weight.T + bias`; keeps nothing dequantized for the backward pass."""
        return frozen_linear(x, bias, self.packed, self.kind, self.shape, self.settings, threshold)

    @property
    def packed(self) -> list[Tensor]:
        """The parts, packed codes as bytes whatever they are stored as."""
        first, *rest = self.parts
        if self.kind in ("nf4", "fp4"):
            first = first.view(torch.uint8)
        return [first, *rest]

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., columns]: some rows, as an embedding looks them up."""
        columns = self.shape[1]
        if self.kind == "int8":
            codes, magnitudes = self.parts
            picked = [codes[ids.flatten()], magnitudes[ids.flatten()]]
        elif self.kind == "hqq" or columns % self.settings[0] or len(self.parts) > 2:
            return functional.embedding(ids, self.dequantize(dtype))
        else:
            codes, magnitudes = (part.view(self.shape[0], -1) for part in self.packed)
            picked = [codes[ids.flatten()].view(-1, 1), magnitudes[ids.flatten()].flatten()]
        found = dequantize(picked, self.kind, (ids.numel(), columns), self.settings, dtype)
        return found.view(*ids.shape, columns)
