"""Documents of a micro-batch, as layers with a state are told of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from headrace.trainer.layers.device import to_device

GAP = 6  # zeros after each document in a row of all: one less than the most taps of convolutions


@dataclass(frozen=True)
class Documents:
    """Documents of b rows of s tokens, padding left out, grouped by their lengths.

    Args:
        order: [n] int64 tokens of all documents, the shortest documents first, as numbers in the
            b * s tokens of the rows.
        groups: (documents, tokens of each), as they follow each other in `order`.
        whole: every row is one document, which needs no order.
        places: [n] int64 where the tokens of `order` are in one row with gaps.
        bounds: [documents + 1] int32, where documents start in that row; gaps belong to the
            documents before them.
    """

    order: Tensor
    groups: tuple[tuple[int, int], ...]
    whole: bool
    places: Tensor
    bounds: Tensor

    def apply(self, mix: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Run a function over each document alone, and put what it returns back into the rows.

        Args:
            mix: [n, length, width] to [n, length, width out], for documents of one length.
            hidden: [b, s, width].

        Returns:
            [b, s, width out], zero where there is padding.
        """
        if self.whole:
            return mix(hidden)
        if not self.groups:
            return torch.zeros_like(hidden)
        tokens = hidden.flatten(0, 1).index_select(0, self.order)
        parts = tokens.split([count * length for count, length in self.groups])
        mixed = torch.cat(
            [
                mix(part.unflatten(0, group)).flatten(0, 1)
                for part, group in zip(parts, self.groups, strict=True)
            ]
        )
        return self._in_rows(mixed, hidden)

    def apply_in_one_row(self, mix: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Do as `apply` with one call, for a function that restarts at `bounds`, or that sees no
        further back than a gap and makes nothing of zeros.

        Args:
            mix: [1, tokens and gaps, width] to the same of another width.
        """
        if not self.groups:
            return torch.zeros_like(hidden)
        tokens = hidden.flatten(0, 1).index_select(0, self.order)
        size = len(self.order) + GAP * (len(self.bounds) - 1)
        row = tokens.new_zeros(size, hidden.shape[-1]).index_copy(0, self.places, tokens)
        return self._in_rows(mix(row.unsqueeze(0))[0].index_select(0, self.places), hidden)

    def _in_rows(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        """Put tokens back into rows like those of `hidden`."""
        rows = mixed.new_zeros(hidden.shape[0] * hidden.shape[1], mixed.shape[-1])
        return rows.index_copy(0, self.order, mixed).unflatten(0, hidden.shape[:2])


def find_documents(
    document_lengths: Sequence[Sequence[int]], row_lengths: Sequence[int], device: torch.device
) -> Documents:
    """Find the documents of a micro-batch.

    Args:
        document_lengths: [b] lengths that sum to s; what follows the tokens of a row is padding.
        row_lengths: [b] tokens of each row.
    """
    size = sum(document_lengths[0])
    starts: dict[int, list[int]] = {}
    for row, (lengths, tokens) in enumerate(zip(document_lengths, row_lengths, strict=True)):
        for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
            if start < tokens:
                starts.setdefault(length, []).append(row * size + start)
    order = [
        (torch.tensor(found).unsqueeze(1) + torch.arange(length)).flatten()
        for length, found in sorted(starts.items())
    ]
    empty = torch.empty(0, dtype=torch.int64)
    groups = tuple((len(found), length) for length, found in sorted(starts.items()))
    sizes = torch.tensor([n for count, n in groups for _ in range(count)], dtype=torch.int64)
    gaps = torch.arange(len(sizes)).repeat_interleave(sizes) * GAP
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), (sizes + GAP).cumsum(0)])
    return Documents(
        order=to_device(torch.cat(order) if order else empty, device),
        groups=groups,
        places=to_device(torch.arange(len(gaps)) + gaps, device),
        bounds=to_device(bounds.int(), device),
        whole=list(starts) == [size] and len(starts[size]) == len(document_lengths),
    )
