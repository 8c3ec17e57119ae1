"""Documents of a micro-batch, as layers with a state are told of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from headrace.trainer.layers.device import to_device


@dataclass(frozen=True)
class Documents:
    """Documents of b rows of s tokens, padding left out, grouped by their lengths.

    Args:
        order: [n] int64 tokens of all documents, the shortest documents first, as numbers in the
            b * s tokens of the rows.
        groups: (documents, tokens of each), as they follow each other in `order`.
        whole: every row is one document, which needs no order.
    """

    order: Tensor
    groups: tuple[tuple[int, int], ...]
    whole: bool

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
    return Documents(
        order=to_device(torch.cat(order) if order else empty, device),
        groups=tuple((len(found), length) for length, found in sorted(starts.items())),
        whole=list(starts) == [size] and len(starts[size]) == len(document_lengths),
    )
