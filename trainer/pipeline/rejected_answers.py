"""The prompts of a batch of pairs, and the batch with other rejected answers to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil

import numpy as np

from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.train.objective_config import RejectedSamplingConfig
from headrace.trainer.batches.batch import Batch
from headrace.trainer.batches.pair_batch import make_pair_batch, tokens_of
from headrace.trainer.pipeline.answers import Answer, Prompt
from headrace.trainer.shards.decoded_pairs import Pair
from headrace.trainer.shards.decoded_rows import Row


@dataclass(frozen=True)
class Room:
    """Tokens of a place, which may hold several rows, and of the longest row."""

    sequence_tokens: int
    row_tokens: int


def prompts_of(
    batch: Batch, room: Room, settings: RejectedSamplingConfig, seed: int
) -> Iterator[Prompt]:
    """A prompt for each pair, in the order of the batch's places.

    What a place has left over is shared out evenly among its pairs.

    Args:
        seed: of the step; each row's own follows from it.
    """
    assert batch.pair_rows is not None
    for place in chain.from_iterable(batch.pair_rows):
        spare = room.sequence_tokens - sum(max(tokens_of(pair)) for pair in place)
        for pair in place:
            prompt = pair.rejected.input_ids[: answer_start(pair.rejected)]
            tokens = min(max(tokens_of(pair)) + spare // len(place), room.row_tokens) - len(prompt)
            limit = min([tokens, *limits(pair.chosen, settings)])
            yield Prompt(prompt.tolist(), limit, derive_seed(seed, pair.chosen.row_key))


def limits(chosen: Row, settings: RejectedSamplingConfig) -> list[int]:
    """The most tokens that an answer may have by config."""
    found = [] if settings.max_new_tokens is None else [settings.max_new_tokens]
    if settings.max_answer_ratio is not None:
        mask = chosen.loss_mask
        tokens = len(chosen.input_ids) if mask is None else int(mask.sum())
        found.append(max(1, ceil(settings.max_answer_ratio * tokens)))
    return found


def with_answers(batch: Batch, answers: Sequence[Answer], room: Room) -> Batch:
    """The batch with these rejected answers in place of its own; all else stays.

    Args:
        answers: to what `prompts_of` gave, in its order.
    """
    assert batch.pair_rows is not None
    left = iter(answers)
    pairs = [
        [[with_answer(pair, next(left)) for pair in place] for place in places]
        for places in batch.pair_rows
    ]
    return make_pair_batch(pairs, room.sequence_tokens, batch.position, batch.overlong)


def with_answer(pair: Pair, answer: Answer) -> Pair:
    """The pair with another rejected answer to its prompt; all of it is trained."""
    start = answer_start(pair.rejected)
    ids = np.append(pair.rejected.input_ids[:start], np.array(answer.ids, np.int32))
    rejected = pair.rejected._replace(
        input_ids=ids,
        loss_mask=np.arange(len(ids)) >= start,
        document_lengths=np.array([len(ids)], np.int32),
    )
    return pair._replace(rejected=rejected)


def answer_start(row: Row) -> int:
    """Tokens before the first trained one; the first token of all is never predicted."""
    return 1 if row.loss_mask is None else max(1, int(row.loss_mask.argmax()))
