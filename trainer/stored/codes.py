"""Codes of a few bits to numbers: what the formats of quantized checkpoints have in common."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1 << 20  # weights that are dequantized at a time; it takes some 12 bytes for each
WORD = 32  # bits
# of 4-bit floats with two bits of exponent (E2M1), by code
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127


@dataclass(frozen=True)
class Scales:
    """Scales of a matrix, each of a block of it.

    Attributes:
        values: [row blocks, column blocks], in the type of the product.
        rows, columns: of a block; the last of a line may be smaller.
        zeros: codes that stand for 0, of the same shape, or None for 0.
        row_blocks, column_blocks: the block of each row and column, where they are not in order.
    """

    values: Tensor
    rows: int
    columns: int
    zeros: Tensor | None = None
    row_blocks: Tensor | None = None
    column_blocks: Tensor | None = None

    def blocks(self, start: int, stop: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return the block of each row from one number to another, and of each column."""
        device = self.values.device
        row_blocks, column_blocks = self.row_blocks, self.column_blocks
        if row_blocks is None:
            row_blocks = torch.arange(stop, device=device) // self.rows
        if column_blocks is None:
            column_blocks = torch.arange(columns, device=device) // self.columns
        return row_blocks[start:stop], column_blocks


def fill(
    out: Tensor,
    stored: Tensor,
    scales: Scales,
    decode: Callable[[Tensor], Tensor] | None = None,
    packed: tuple[int, int] = (1, 1),
) -> Tensor:
    """Fill a matrix with codes less their zero points, times their scales, some rows at a time.

    The product is of the scales' type, and rounded to that of `out` once more.

    Args:
        out: [rows, columns], of any layout.
        stored: codes as they are stored, rows first.
        decode: returns some rows of codes, of any type, from what is stored of them.
        packed: how many rows are packed together, and into how many stored ones.
    """
    rows, columns = out.shape
    step, lines = packed
    size = max(1, PIECE // columns // step) * step
    for start in range(0, rows, size):
        stop = min(rows, start + size)
        piece = stored[start // step * lines : -(-stop // step) * lines]
        codes = (piece if decode is None else decode(piece))[: stop - start]
        row_blocks, column_blocks = scales.blocks(start, stop, columns)
        codes = codes.to(scales.values.dtype)
        if scales.zeros is not None:
            zeros = scales.zeros[row_blocks][:, column_blocks]
            codes = codes - zeros.to(codes.dtype)
        out[start:stop] = codes * scales.values[row_blocks][:, column_blocks]
    return out


def e2m1(packed: Tensor) -> Tensor:
    """Return [..., 2 n] floats of [..., n] bytes, each of two codes, the lower half first."""
    table = torch.tensor(E2M1, device=packed.device)
    packed = packed.view(torch.uint8)
    return table[torch.stack((packed & 15, packed >> 4), dim=-1).int()].flatten(-2)


def powers_of_two(exponents: Tensor) -> Tensor:
    """Return float32 of scales that are exponents alone (E8M0), as bytes or torch's type."""
    if exponents.dtype != torch.uint8:
        return exponents.float()
    exponents = exponents.int() - E8M0_BIAS
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Return [rows, count] codes of [rows, n] words of 32 bits, one code after the other from the
    lowest bit on; a code may lie in two words.
    """
    first = torch.arange(count, device=words.device) * bits
    index, shift = first // WORD, (first % WORD).int()
    codes = (words[:, index] >> shift) & ((1 << (WORD - shift).clamp(max=bits)) - 1)
    if WORD % bits:
        split = WORD - shift < bits
        low = (WORD - shift)[split]
        high = words[:, index[split] + 1] & ((1 << (bits - low)) - 1)
        codes[:, split] |= high << low
    return codes
