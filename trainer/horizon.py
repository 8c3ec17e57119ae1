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
    stop_row = find_stop_row(config, inputs, step, position)
    if config.max_steps:
        return Horizon(config.max_steps, stop_row)
    assert stop_row is not None
    places = count_places(inputs.place_tokens, stream, stop_row, position)
    return Horizon(step - (-places // inputs.global_batch_rows), stop_row)


def find_stop_row(config: TrainConfig, inputs: Inputs, step: int, position: Position) -> int | None:
    """Where the data ends: with `epochs` fixed, with `max_steps` after the steps that are left."""
    if not config.max_steps:
        return inputs.plan.rows_in(config.epochs or 1)
    if config.loader.pack != "none":
        return None
    return position.next_row + (config.max_steps - step) * inputs.global_batch_rows
