"""End of a run: the total number of steps, and the row at which the data ends."""

from collections.abc import Sequence
from typing import NamedTuple

from headrace.schemas.train.data_config import DataConfig
from headrace.schemas.train.run_state import QuarantineRecord
from headrace.trainer.order.data_history import DataHistory
from headrace.trainer.order.datasets import Inputs
from headrace.trainer.order.position import Position
from headrace.trainer.order.sequences import count_sequences, train_stream
from headrace.trainer.shards.shard_reader import ShardReader


class RunLength(NamedTuple):
    """Steps in all, those already done included, and the row at which the data ends."""

    total_steps: int
    stop_row: int | None  # global row index; None: packed rows go on until the last step


def find_run_length(
    config: DataConfig,
    inputs: Inputs,
    data_history: DataHistory,
    step: int,
    position: Position,
    quarantined: Sequence[QuarantineRecord] = (),
) -> RunLength:
    """The end of a run that has done `step` steps and stands at `position`.

    How many places packed rows need shows only in packing them; their lengths are read for it.
    """
    stop_row = data_history.stop_row(config, inputs.global_batch_rows, step, position)
    if config.max_steps:
        return RunLength(config.max_steps, stop_row)
    assert stop_row is not None
    stream = train_stream(config, data_history)
    reader = ShardReader(stream.facts, stream)
    reader.quarantine.restore(quarantined)
    places = count_sequences(inputs.sequence_tokens, stream, reader, stop_row, position)
    return RunLength(step - (-places // inputs.global_batch_rows), stop_row)
