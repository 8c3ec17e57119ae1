"""Pairs as tensors: chosen answers in one half of a micro-batch's places, rejected in the other."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from headrace.trainer.batches.batch import Batch, make_batch, packed_row
from headrace.trainer.batches.extras import Extras
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.shards.decoded_pairs import SIDES, Pair
from headrace.trainer.shards.packed_rows import PackedRow


def make_pair_batch(
    micro_batches: Sequence[Sequence[Sequence[Pair]]],
    length: int,
    position: Position,
    overlong: OverlongCount,
) -> Batch:
    """Lay pairs out: b places of chosen answers, then b of rejected ones, in the same order.

    Args: as `make_batch`.
    """
    sides = [
        [[[pair[side] for pair in place] for place in places] for side in range(SIDES)]
        for places in micro_batches
    ]
    batch = make_batch(
        [chosen + rejected for chosen, rejected in sides], length, position, overlong
    )
    chosen_labels = batch.labels[:, : len(micro_batches[0])]
    return replace(
        batch,
        rows=[
            [[place_pair(pair) for pair in place] for place in places] for places in micro_batches
        ],
        extras=[
            Extras(pairs=[[tokens_of(pair) for pair in place] for place in places])
            for places in micro_batches
        ],
        pair_rows=[[list(place) for place in places] for places in micro_batches],
        chosen_tokens=int((chosen_labels >= 0).sum()),
    )


def make_scored_batch(
    micro_batches: Sequence[Sequence[Sequence[Pair]]],
    length: int,
    position: Position,
    overlong: OverlongCount,
    *,
    padding: int | None,
) -> Batch:
    """`make_pair_batch` with `ends`.

    Args:
        padding: id that transformers looks for the last token before; None looks for none.
    """
    batch = make_pair_batch(micro_batches, length, position, overlong)
    extras = [
        replace(of_batch, ends=ends_of(places, padding))
        for of_batch, places in zip(batch.extras, micro_batches, strict=True)
    ]
    return replace(batch, extras=extras)


def ends_of(places: Sequence[Sequence[Pair]], padding: int | None) -> list[tuple[int, int]]:
    """Return sequence and place of each side's last token that is no padding."""
    ends = []
    for side in range(SIDES):
        for number, place in enumerate(places):
            start = 0
            for pair in place:
                ids = pair[side].input_ids
                real = np.flatnonzero(ids != padding) if padding is not None else [len(ids) - 1]
                ends.append(
                    (number + side * len(places), start + int(real[-1]) if len(real) else start)
                )
                start += len(ids)
    return ends


def tokens_of(pair: Pair) -> tuple[int, int]:
    """Tokens of both sides."""
    return len(pair.chosen.input_ids), len(pair.rejected.input_ids)


def place_pair(pair: Pair) -> PackedRow:
    """Return the record of a pair; no side is longer than a sequence."""
    tokens = sum(tokens_of(pair))
    return packed_row(pair.chosen, tokens)._replace(tokens=tokens)
