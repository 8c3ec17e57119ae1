"""Single answers as tensors, and beside them the same prompts with the answers to other ones."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.trainer.batches.batch import Batch, make_batch
from headrace.trainer.batches.extras import Extras, Pairs
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.shards.decoded_rows import Row
from headrace.trainer.shards.packed_rows import PackedRow


def make_answer_batch(
    micro_batches: Sequence[Sequence[Sequence[Row]]],
    length: int,
    position: Position,
    overlong: OverlongCount,
    *,
    mismatched: bool = False,
) -> Batch:
    """Lay answers out; nothing but themselves counts as tokens or rows of the batch.

    Args:
        mismatched: let b more sequences follow the b of a micro-batch: prompt k with the answer to
            prompt k - 1, and the first with the last answer, each cut at `length`. There is one
            answer a sequence then.
    """
    both = [[*places, *(mismatched_rows(places) if mismatched else ())] for places in micro_batches]
    batch, own = make_batch(both, length, position, overlong), len(micro_batches[0])
    return replace(
        batch,
        rows=[placed[:own] for placed in batch.rows],
        trained_tokens=int(np.count_nonzero(batch.labels[:, :own] != IGNORED_LABEL)),
        extras=[
            Extras(
                pairs=lengths_of(placed, own),
                desirable=[bool(row.desirable) for place in places for row in place],
                mismatched=mismatched,
            )
            for places, placed in zip(micro_batches, batch.rows, strict=True)
        ],
    )


def mismatched_rows(places: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """Return each prompt of a micro-batch with the answer to the one before it, one a sequence."""
    rows = [row for place in places for row in place]
    assert all(len(place) <= 1 for place in places)
    others = [joined(row, rows[number - 1]) for number, row in enumerate(rows)]
    return [[row] for row in others] + [[] for _ in places[len(rows) :]]


def joined(asked: Row, answered: Row) -> Row:
    """Return one row's prompt, up to its first trained token, with another row's answer."""
    prompt = asked.input_ids[: first_trained(asked)]
    start = first_trained(answered)
    answer = answered.input_ids[start:]
    mask = np.ones(len(answer), np.bool_)
    if answered.loss_mask is not None:
        mask = answered.loss_mask[start:]
    return asked._replace(
        input_ids=np.concatenate([prompt, answer]),
        loss_mask=np.concatenate([np.zeros(len(prompt), np.bool_), mask]),
        document_lengths=np.array([len(prompt) + len(answer)], np.int32),
    )


def first_trained(row: Row) -> int:
    """Return the place of the first trained token, where the answer begins."""
    return 0 if row.loss_mask is None else int(np.argmax(row.loss_mask))


def lengths_of(placed: Sequence[Sequence[PackedRow]], own: int) -> Pairs:
    """Return the tokens of each answer's sequence, and of its mismatched one, 0 where none is.

    Args:
        placed: the rows of all sequences of a micro-batch, of which the first `own` hold answers.
    """
    others = placed[own:] or [[row._replace(tokens=0) for row in place] for place in placed]
    return [
        [(row.tokens, other.tokens) for row, other in zip(place, beside, strict=True)]
        for place, beside in zip(placed[:own], others, strict=True)
    ]
