"""Cosine and sine of the positions, one table for each kind of layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Table = tuple[Tensor, Tensor]
AXES = 3  # of positions in time, height and width, all the same in text


def rotary_tables(
    rotary: nn.Module | None,
    kinds: Sequence[str | None],
    hidden: Tensor,
    positions: Tensor,
    documents: list[list[int]] | None,
) -> dict[str | None, Any]:
    """The tables that layers of these kinds ask for.

    Args:
        rotary: the model's own module; None for models without.
        hidden: hidden states, whose type and device the tables take.
        positions: [b, s] int64, or [3, b, s] where there are pictures.
        documents: their lengths, [b], where frequencies depend on how long the text is; else None.
    """
    if rotary is None:
        return {}
    return {
        kind: _table(rotary, kind, hidden, positions)
        if documents is None
        else _by_document(rotary, kind, hidden, positions, documents)
        for kind in dict.fromkeys(kinds)
    }


def _table(rotary: nn.Module, kind: str | None, hidden: Tensor, positions: Tensor) -> Table | None:
    if isinstance(rotary, nn.ModuleList):  # one for each base of frequencies; none without
        found = [part for part in rotary if base_of(part) == kind]
        return _table(found[0], None, hidden, positions) if found else None
    if positions.ndim == 2 and len(getattr(rotary, "mrope_section", ())) == AXES:
        positions = positions.expand(AXES, -1, -1)  # transformers 5.17 asks for all
    table: Table = rotary(hidden, positions, *([] if kind is None else [kind]))
    return table


def base_of(rotary: Any) -> str:
    """Return the base of a module's frequencies, as its layers name it."""
    return str(rotary.config.rope_parameters["rope_theta"])


def fresh(rotary: Any, config: Any) -> nn.Module:
    """Return a module like another, with buffers of its own.

    Args:
        config: of the language model.
    """
    if isinstance(rotary, nn.ModuleList):
        return nn.ModuleList(fresh(part, part.config) for part in rotary)
    made: nn.Module = type(rotary)(config=config)
    return made


def _by_document(
    rotary: nn.Module,
    kind: str | None,
    hidden: Tensor,
    positions: Tensor,
    documents: list[list[int]],
) -> Table:
    """Compute the tables that each document alone would have."""
    rows = []
    for row, lengths in enumerate(documents):
        parts = positions[row : row + 1].split(lengths, dim=1)
        tables = [_table(rotary, kind, hidden, at) for at in parts]
        rows.append([torch.cat(kinds, dim=1) for kinds in zip(*tables, strict=True)])
    cosine, sine = (torch.cat(kinds) for kinds in zip(*rows, strict=True))
    return cosine, sine
