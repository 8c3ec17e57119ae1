"""States that an optimizer keeps for each weight, as named tensors, for checkpoints.

Numbers that an optimizer keeps for a group of weights are saved with each of them, so that any
layout finds them by a weight's name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headrace.schemas.errors import CheckpointError
from headrace.schemas.train.optimizers import Fresh, Holder, State
from headrace.trainer.building.parameter_slots import TrainedParameter
from headrace.trainer.optim.optimizer import OptimizerAround, record_of
from headrace.trainer.optim.parameter_groups import ORTHOGONAL

FIXED = ("qmap1", "qmap2")  # bitsandbytes' code books, the same for all weights and never changed
Read = Callable[[str, torch.Size], Tensor]


def tensors_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The states of a weight, as they start if it was never stepped.

    Where they are shared out, all ranks with the same weights call this at the same time.

    Raises:
        CheckpointError: it has other states than its record says.
    """
    if isinstance(optimizer, OptimizerAround):
        return optimizer.tensors_of(parameter)
    states = optimizer.state.get(parameter) or fresh_states(optimizer, parameter)
    check_names(optimizer, parameter, states)
    tensors = {name: torch.as_tensor(v) for name, v in states.items() if name not in FIXED}
    for name, value in group_numbers(optimizer, parameter).items():
        tensors[name] = torch.tensor(value, dtype=torch.float64)
    return tensors


def restore(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, read: Read) -> None:
    """Give a weight the states that `read` finds by their names and shapes."""
    if isinstance(optimizer, OptimizerAround):
        return optimizer.restore(parameter, read)
    states = fresh_states(optimizer, parameter)
    for name, fresh in states.items():
        if name in FIXED:
            continue
        if isinstance(fresh, Tensor):
            fresh.copy_(read(name, fresh.shape))
        else:
            states[name] = int(read(name, torch.Size()))
    optimizer.state[parameter] = states
    group = optimizer.param_groups[group_number(optimizer, parameter)]
    for name, value in group_numbers(optimizer, parameter).items():
        group[name] = type(value)(read(name, torch.Size()).item())


def fresh_states(optimizer: Any, parameter: nn.Parameter) -> dict[str, Any]:
    """Return the states of a weight before the optimizer's first step."""
    kinds = record_of(optimizer).states
    number = group_number(optimizer, parameter)
    group = optimizer.param_groups[number]
    if kinds is not None:
        held = state_names(kinds, parameter, group)
        return {name: FRESH[kinds[name].fresh](parameter) for name in held}
    place = next(i for i, member in enumerate(group["params"]) if member is parameter)
    optimizer.init_state(group, parameter, number, place)
    return dict(optimizer.state.pop(parameter))


FRESH: dict[Fresh, Callable[[Tensor], Any]] = {
    "zeros": torch.zeros_like,
    "copy": lambda weight: weight.detach().clone(),
    "number": lambda weight: 0,
    "count": lambda weight: torch.zeros(()),
    "count_on_device": lambda weight: torch.zeros((), device=weight.device),
    "rows": lambda weight: weight.new_zeros([*weight.shape[:-1], 1]),
    "columns": lambda weight: weight.new_zeros([*weight.shape[:-2], 1, weight.shape[-1]]),
    "rows_flat": lambda weight: weight.new_zeros(weight.shape[:-1]),
    "columns_flat": lambda weight: weight.new_zeros([*weight.shape[:-2], weight.shape[-1]]),
}
HOLDS: dict[Holder, Callable[[Tensor, Mapping[str, Any]], bool]] = {
    "all": lambda weight, group: True,
    "matrix": lambda weight, group: weight.ndim > 1,
    "vector": lambda weight, group: weight.ndim <= 1,
    "moving": lambda weight, group: bool(group["momentum"]),
    "orthogonal": lambda weight, group: bool(group[ORTHOGONAL]),
    "other": lambda weight, group: not group[ORTHOGONAL],
}


def state_names(
    kinds: Mapping[str, State], parameter: Tensor, group: Mapping[str, Any]
) -> list[str]:
    """List the states of a weight in its group."""
    return [name for name, kind in kinds.items() if HOLDS[kind.of](parameter, group)]


def check_names(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, states: Mapping[str, object]
) -> None:
    """Refuse states that the record does not have, and that a resumed run would miss."""
    kinds = record_of(optimizer).states
    if kinds is None:
        return
    group = optimizer.param_groups[group_number(optimizer, parameter)]
    if wrong := states.keys() ^ {*state_names(kinds, parameter, group)}:
        raise CheckpointError(
            f"{type(optimizer).__name__}: its states differ from its record in "
            f"headrace.schemas.train.optimizers by {', '.join(sorted(wrong))}"
        )


def group_numbers(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> dict[str, int | float]:
    """Return the numbers of a weight's group that its checkpoint holds too."""
    group = optimizer.param_groups[group_number(optimizer, parameter)]
    return {name: group[name] for name in record_of(optimizer).group_numbers}


def group_number(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    """The number of the group that a weight belongs to."""
    return next(
        number
        for number, group in enumerate(optimizer.param_groups)
        if any(member is parameter for member in group["params"])
    )


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether weights are trained at one point and used at another, their average."""
    return record_of(optimizer).averages


@contextmanager
def averaged(
    optimizer: torch.optim.Optimizer, trained: Sequence[TrainedParameter]
) -> Iterator[None]:
    """Inside, the weights are those that are used: for evaluation and export.

    Afterwards they are what they were, to the bit, which schedule-free's own way back is not.
    """
    if not is_schedule_free(optimizer):
        yield
        return
    kept = [item.parameter.detach().clone() for item in trained]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for item, value in zip(trained, kept, strict=True):
                item.parameter.copy_(value)
