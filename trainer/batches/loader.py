"""The loader of one pipeline group: reads ahead in a thread and always knows its offset."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from headrace.trainer.batches.batch import Batch, make_batch
from headrace.trainer.order.position import Position
from headrace.trainer.order.row_packer import Sequences
from headrace.trainer.shards.quarantine import Quarantine


class Reader(Protocol):
    """A reader of rows, as far as the owner of a loader asks: for what it has given up."""

    @property
    def quarantine(self) -> Quarantine: ...


class GroupLoader:
    """One replica's share of each global batch, in order, from any position on.

    Micro-batch k of a global batch holds its places [k*b, (k+1)*b) and goes to replica
    k mod replicas, so a global batch is the same rows for any number of replicas and stages.

    Args:
        reader: what the rows come from.
        places_from: the sequence of places from a position on; rows are decoded when called.
        place_tokens: tokens of a place.
        prefetch: global batches read ahead in a background thread; 0 reads in line.
        lay_out: makes a batch of rows, or of whatever `reader` decodes.
    """

    def __init__(
        self,
        reader: Reader,
        places_from: Callable[[Position], Sequences[Callable[[], Any]]],
        *,
        sequence_tokens: int,
        micro_batch_size: int,
        micro_batches: int,
        replica: int,
        replicas: int,
        prefetch: int,
        lay_out: Callable[..., Batch] = make_batch,
    ) -> None:
        self.reader = reader
        self.places_from = places_from
        self.sequence_tokens = sequence_tokens
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches
        self.replica = replica
        self.replicas = replicas
        self.prefetch = prefetch
        self.lay_out = lay_out
        self.position = Position()
        self._batches: Iterator[Batch] | None = None
        self._reading = threading.Lock()  # after `seek` an earlier thread may be at a last batch

    def state_dict(self) -> dict[str, object]:
        """Return the position of the next batch, which is all there is to resume from."""
        return self.position._asdict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.seek(Position(**state))  # type: ignore[arg-type]

    def seek(self, position: Position) -> None:
        """Go on from there."""
        self.position = position
        self._batches = None

    def __iter__(self) -> "GroupLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            batches = self._read(self.position)
            self._batches = read_ahead(batches, self.prefetch) if self.prefetch else batches
        batch = next(self._batches)
        self.position = batch.position
        return batch

    def _read(self, position: Position) -> Iterator[Batch]:
        with self._reading:
            places = self.places_from(position)
        while True:
            with self._reading:
                batch = self._next_batch(places)
            if batch is None:
                return
            yield batch

    def _next_batch(self, places: Sequences[Callable[[], Any]]) -> Batch | None:
        per_round = self.micro_batch_size * self.replicas
        taken = places.take(per_round * self.micro_batches)
        if not taken:
            return None
        starts = range(
            self.replica * self.micro_batch_size, -(-len(taken) // per_round) * per_round, per_round
        )
        micro_batches = [
            self._micro_batch(taken[start : start + self.micro_batch_size]) for start in starts
        ]
        overlong = places.take_overlong()
        return self.lay_out(micro_batches, self.sequence_tokens, places.position, overlong)

    def _micro_batch(self, places: list[list[Callable[[], Any]]]) -> list[list[Any]]:
        filled = [[decode() for decode in place] for place in places]
        return filled + [[] for _ in range(self.micro_batch_size - len(filled))]


def read_ahead(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Pull batches in a background thread, at most `depth` ahead; its errors are raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 (handed over, and raised in the consumer)
            put(error)

    threading.Thread(target=produce, name="loader", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
