"""Answers one after the other, piece by piece, from a model in this process."""

import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from headrace.schemas.errors import DataError, HeadraceError
from headrace.trainer.export.sample import Messages, Sampler, Sampling

logger = logging.getLogger(__name__)

MOST_WAITING = 256


class BusyError(HeadraceError):
    """More requests wait than are taken."""


@dataclass(frozen=True)
class Ask:
    """A prompt, and how it is answered.

    `stop`: texts before which an answer ends. `adapter`: with the adapter, if there is one.
    """

    prompt: str | Messages
    sampling: Sampling
    stop: tuple[str, ...] = ()
    adapter: bool = True


class Pieces(TextIteratorStreamer):
    """Texts of an answer as they come, which counts tokens and remembers the last."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.prompt_seen = False
        self.tokens = 0
        self.last = -1
        self.error: Exception | None = None

    def put(self, value: Any) -> None:
        """Take the next tokens; the first call brings the prompt."""
        if self.prompt_seen:
            self.tokens += 1
            self.last = int(value.flatten()[-1])
        self.prompt_seen = True
        super().put(value)


class Given(StoppingCriteria):
    """Ends the answer when nobody wants more of it."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@dataclass
class Answer:
    """An answer that comes; iterate over it once, then its counts and reason are known."""

    ask: Ask
    ids: list[int]
    ends: frozenset[int]
    pieces: Pieces
    given_up: Given = field(default_factory=Given)
    finish_reason: str = "length"

    @property
    def prompt_tokens(self) -> int:
        """Return the tokens of the prompt."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Return the tokens of the answer, an end token included."""
        return self.pieces.tokens

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text up to the first stop text.

        Raises:
            HeadraceError: the model cannot answer this.
        """
        try:
            yield from before_stop(self.pieces, self.ask.stop, self._stopped)
        finally:
            self.given_up.event.set()
        if self.pieces.error is not None:
            raise self.pieces.error
        if self.pieces.last in self.ends:
            self.finish_reason = "stop"

    def _stopped(self) -> None:
        self.finish_reason = "stop"


def before_stop(pieces: Iterator[str], stops: tuple[str, ...], stopped: Any) -> Iterator[str]:
    """Yield text up to the first stop text; what may be the begin of one is held back.

    Args:
        stopped: called when one was found.
    """
    held = ""
    longest = max(map(len, stops), default=1)
    for piece in pieces:
        held += piece
        found = [at for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            stopped()
            if min(found):
                yield held[: min(found)]
            return
        sure = len(held) - longest + 1
        if sure > 0:
            yield held[:sure]
            held = held[sure:]
    if held:
        yield held


class Answerer:
    """A thread that answers one request after the other.

    Args:
        positions: the most tokens of a prompt with its answer.
    """

    def __init__(self, sampler: Sampler, positions: int | None) -> None:
        self.sampler = sampler
        self.positions = positions
        self.waiting: queue.Queue[Answer | None] = queue.Queue(MOST_WAITING)
        self.ends = end_tokens(sampler.network)
        self.thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self.thread.start()

    def ask(self, ask: Ask) -> Answer:
        """Take a request in.

        Raises:
            DataError: a prompt that is empty, or too long for the model.
            BusyError: too many wait.
        """
        ids = self.sampler.encode(ask.prompt)
        wanted = len(ids) + ask.sampling.max_new_tokens
        if not ids:
            raise DataError("the prompt is empty; write something")
        if self.positions is not None and wanted > self.positions:
            raise DataError(
                f"{len(ids)} tokens of the prompt and max_tokens = {ask.sampling.max_new_tokens} "
                f"are more than the {self.positions} that the model takes; ask for fewer"
            )
        answer = Answer(ask, ids, self.ends, Pieces(self.sampler.tokenizer))
        try:
            self.waiting.put_nowait(answer)
        except queue.Full:
            raise BusyError(f"{MOST_WAITING} requests wait already; ask again later") from None
        return answer

    def close(self) -> None:
        """End the thread after what it is at."""
        self.waiting.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (answer := self.waiting.get()) is not None:
            if not answer.given_up.event.is_set():
                self._answer(answer)

    def _answer(self, answer: Answer) -> None:
        """Generate; an error goes to who asked."""
        try:
            self.sampler.generate(
                answer.ids,
                answer.ask.sampling,
                adapter=answer.ask.adapter,
                streamer=answer.pieces,
                stopping_criteria=StoppingCriteriaList([answer.given_up]),
            )
        except Exception as error:  # noqa: BLE001  handed to the thread that asked
            logger.warning("no answer: %s", error)
            answer.pieces.error = DataError(f"the model cannot answer this ({error})")
            answer.pieces.end()


def end_tokens(network: Any) -> frozenset[int]:
    """Return the tokens that end an answer."""
    ends = network.generation_config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or [])
