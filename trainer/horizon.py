"""Where a run ends, seen from where it stands."""

from typing import NamedTuple

from headrace.schemas.train_config import TrainConfig
from headrace.trainer.places import RowStream, count_places
from headrace.trainer.position import Position
from headrace.trainer.preflight import Inputs


class Horizon(NamedTuple):
    """Steps in all, those already done included, and the row at which the data ends."""

    total_steps: int
    stop_row: int | None  # global row index; None: packed rows go on until the last step


def find_horizon(
    config: TrainConfig, inputs: Inputs, stream: RowStream, step: int, position: Position
) -> Horizon:
    """The end of a run that has done `step` steps and stands at `position`.

    How many places packed rows need shows only in packing them; their lengths are read for it.
    """
    batch = inputs.global_batch_rows
    if config.max_steps:
        packed = config.loader.pack != "none"
        rows = position.next_row + (config.max_steps - step) * batch
        return Horizon(config.max_steps, None if packed else rows)
    stop_row = inputs.plan.rows_in(config.epochs or 1)
    places = count_places(config.loader, inputs.place_tokens, stream, stop_row, position)
    return Horizon(step - (-places // batch), stop_row)
