"""The loader of one pipeline group: reads ahead in a thread and always knows its offset."""

import queue
import threading
from collections.abc import Iterator

from headrace.trainer.batch import Batch, make_batch
from headrace.trainer.decoded_rows import Row
from headrace.trainer.mixed_order import MixedOrder
from headrace.trainer.row_order import RowOrder
from headrace.trainer.shard_reader import ShardReader


class GroupLoader:
    """One replica's share of each global batch, in order, from any row on.

    Micro-batch k of a global batch holds its rows [k*b, (k+1)*b) and goes to replica
    k mod replicas, so a global batch is the same rows for any number of replicas and stages.

    Args:
        stop_row: global row index at which the data ends; the last global batch may be smaller.
        prefetch: global batches read ahead in a background thread; 0 reads in line.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: RowOrder | MixedOrder,
        *,
        sequence_len: int,
        micro_batch_size: int,
        micro_batches: int,
        replica: int,
        replicas: int,
        stop_row: int,
        prefetch: int,
    ) -> None:
        self.reader = reader
        self.order = order
        self.sequence_len = sequence_len
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches
        self.replica = replica
        self.replicas = replicas
        self.stop_row = stop_row
        self.prefetch = prefetch
        self.next_row = 0
        self._batches: Iterator[Batch] | None = None

    @property
    def global_batch_rows(self) -> int:
        return self.micro_batch_size * self.micro_batches * self.replicas

    def state_dict(self) -> dict[str, int]:
        """The global row index of the next batch, which is all there is to resume from."""
        return {"next_row": self.next_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_row = state["next_row"]
        self._batches = None

    def __iter__(self) -> "GroupLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            batches = self._read(self.next_row)
            self._batches = read_ahead(batches, self.prefetch) if self.prefetch else batches
        batch = next(self._batches)
        self.next_row = min(self.next_row + self.global_batch_rows, self.stop_row)
        return batch

    def _read(self, first: int) -> Iterator[Batch]:
        while first < self.stop_row:
            rows = min(self.global_batch_rows, self.stop_row - first)
            per_round = self.micro_batch_size * self.replicas
            rounds = -(-rows // per_round)
            starts = [
                first + (index * self.replicas + self.replica) * self.micro_batch_size
                for index in range(rounds)
            ]
            yield make_batch([self._micro_batch(start) for start in starts], self.sequence_len)
            first += rows

    def _micro_batch(self, start: int) -> list[list[Row]]:
        indices = range(start, start + self.micro_batch_size)
        return [
            [self.reader.row(self.order[index])] if index < self.stop_row else []
            for index in indices
        ]


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
