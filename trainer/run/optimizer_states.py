"""States that an optimizer keeps for each weight, as named tensors, for checkpoints.

Numbers that an optimizer keeps for a group of weights are saved with each of them, so that any
layout finds them by a weight's name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headrace.trainer.model.slots import TrainedParameter
from headrace.trainer.run.adamw_kahan import AdamWKahan

FIXED = ("qmap1", "qmap2")  # bitsandbytes' code books, the same for all weights and never changed
GROUP_NUMBERS = ("k", "lr_max", "weight_sum")  # of schedule-free
Read = Callable[[str, torch.Size], Tensor]


def tensors_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The states of a weight, as they start if it was never stepped."""
    states = optimizer.state.get(parameter) or fresh_states(optimizer, parameter)
    tensors = {name: torch.as_tensor(v) for name, v in states.items() if name not in FIXED}
    if is_schedule_free(optimizer):
        group = optimizer.param_groups[group_number(optimizer, parameter)]
        for name in GROUP_NUMBERS:
            tensors[name] = torch.tensor(group[name], dtype=torch.float64)
    return tensors


def restore(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, read: Read) -> None:
    """Give a weight the states that `read` finds by their names and shapes."""
    states = fresh_states(optimizer, parameter)
    for name, fresh in states.items():
        if name in FIXED:
            continue
        if isinstance(fresh, Tensor):
            fresh.copy_(read(name, fresh.shape))
        else:
            states[name] = int(read(name, torch.Size()))
    optimizer.state[parameter] = states
    if is_schedule_free(optimizer):
        group = optimizer.param_groups[group_number(optimizer, parameter)]
        for name in GROUP_NUMBERS:
            group[name] = type(group[name])(read(name, torch.Size()).item())


def fresh_states(optimizer: Any, parameter: nn.Parameter) -> dict[str, Any]:
    """Return the states of a weight before the optimizer's first step."""

    def zeros(*names: str) -> dict[str, Tensor]:
        return {name: torch.zeros_like(parameter) for name in names}

    if isinstance(optimizer, AdamWKahan):
        return {"step": torch.zeros(()), **zeros("exp_avg", "exp_avg_sq", "compensation")}
    if isinstance(optimizer, torch.optim.Adam):  # AdamW too
        step = torch.zeros((), device=parameter.device)
        return {"step": step, **zeros("exp_avg", "exp_avg_sq")}
    if isinstance(optimizer, torch.optim.Adafactor):
        return {"step": torch.zeros(())} | factors(parameter)
    if is_schedule_free(optimizer):
        return {"z": parameter.detach().clone(), **zeros("exp_avg_sq")}
    if hasattr(optimizer, "init_state"):  # bitsandbytes
        number = group_number(optimizer, parameter)
        group = optimizer.param_groups[number]
        place = next(i for i, member in enumerate(group["params"]) if member is parameter)
        optimizer.init_state(group, parameter, number, place)
        return dict(optimizer.state.pop(parameter))
    return zeros("exp_avg")  # Lion


def factors(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Adafactor's second moments: of rows and columns, or of each entry of a vector."""
    if parameter.ndim < 2:
        return {"variance": torch.zeros_like(parameter)}
    *outer, rows, columns = parameter.shape
    return {
        "row_var": parameter.new_zeros([*outer, rows, 1]),
        "col_var": parameter.new_zeros([*outer, 1, columns]),
    }


def group_number(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    """The number of the group that a weight belongs to."""
    return next(
        number
        for number, group in enumerate(optimizer.param_groups)
        if any(member is parameter for member in group["params"])
    )


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether weights are trained at one point and used at another, their average."""
    return all("train_mode" in group for group in optimizer.param_groups)


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


def average(parameter: Tensor, z: Tensor, beta1: float) -> Tensor:
    """The weight that is used, of one that schedule-free trains and its z."""
    return torch.lerp(parameter, z, 1 - 1 / beta1)
