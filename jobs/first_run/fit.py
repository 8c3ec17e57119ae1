"""Plans of a run that fits this machine: `headrace plan`'s best layout of a model over its GPUs."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from headrace.jobs.first_run.machine import Fit, Machine
from headrace.schemas.errors import HeadraceError
from headrace.schemas.train.train_config import TrainConfig

if TYPE_CHECKING:
    from headrace.trainer.building.model_plan import Plan
    from headrace.trainer.planning.planned_run import RunPlan, TriedModel
    from headrace.trainer.planning.proposals import Proposal

NF4 = {"backend": "bnb"}
PRECISIONS: tuple[dict[str, Any], ...] = ({}, {"quantization": NF4})  # the mildest first
ROWS_OF_STEP = 64  # by which layouts are compared: as many as a step has at most
AS_FAST = 0.95  # of the best rate: of such layouts the one with the fewest keys is taken
OF_DATA = "gradient_accumulation_steps"  # follows from the number of rows, later


class Planner(NamedTuple):
    """The functions of `headrace.trainer` by which runs are planned."""

    plan_model: "Callable[[TrainConfig], Plan]"
    plan_run: "Callable[[TrainConfig, Plan, int, int], RunPlan]"
    propose: "Callable[[RunPlan, int, float, TriedModel], list[Proposal]]"
    plans: "Callable[[RunPlan, int, TriedModel], Iterable[tuple[Mapping[str, Any], RunPlan]]]"
    tried: "Callable[[RunPlan], TriedModel]"


def fit(planner: Planner, values: dict[str, Any], sequence_len: int, machine: Machine) -> Fit:
    """Return the keys with which a run fits the machine, and goes fastest there.

    Args:
        values: the config so far, without stages.

    Raises:
        ConfigError: the model is not supported.
    """
    if not machine.gpus:
        planner.plan_model(TrainConfig.model_validate(values))
        return Fit(1)
    runs: list[tuple[dict[str, Any], RunPlan]] = []
    for precision in PRECISIONS:
        try:
            run = planned(planner, {**values, **precision}, machine.gpus, sequence_len)
        except HeadraceError:
            if not precision:
                raise
            break  # this model cannot be quantized so
        found = fastest(planner, run, machine)
        if found is not None:
            return found.with_changes(precision)
        runs.append((precision, run))
    return min((smallest(planner, run, machine).with_changes(more) for more, run in runs), key=peak)


def planned(planner: Planner, values: dict[str, Any], gpus: int, sequence_len: int) -> "RunPlan":
    """Return the plan of a run whose every GPU is a replica, with as many rows as a step may have.

    Raises:
        HeadraceError: the model cannot be trained so.
    """
    steps = max(1, ROWS_OF_STEP // gpus)
    config = TrainConfig.model_validate({**values, "pipeline_stages": 1, OF_DATA: steps})
    return planner.plan_run(config, planner.plan_model(config), gpus, sequence_len)


def fastest(planner: Planner, run: "RunPlan", machine: Machine) -> Fit | None:
    """Return the layout with the fewest keys among the fastest that fit; None: none does."""
    found = planner.propose(run, machine.gpus, machine.memory, planner.tried(run))
    if not found:
        return None
    fast = [proposal for proposal in found if proposal.rate >= AS_FAST * found[0].rate]
    best = min(fast, key=lambda proposal: len(proposal.changes.keys() - {OF_DATA}))
    return as_fit(best.run, best.changes.items(), fits=True)


def smallest(planner: Planner, run: "RunPlan", machine: Machine) -> Fit:
    """Return the layout whose fullest GPU holds least."""
    found = planner.plans(run, machine.gpus, planner.tried(run))
    changes, smaller = min(found, key=lambda pair: pair[1].peak)
    return as_fit(smaller, changes.items(), fits=False)


def as_fit(run: "RunPlan", changes: Iterable[tuple[str, Any]], *, fits: bool) -> Fit:
    """Return a planned layout, without what follows from the data."""
    kept = {key: value for key, value in changes if key not in (OF_DATA, "pipeline_stages")}
    return Fit(run.config.pipeline_stages, kept, run.peak, fits, run.replicas)


def peak(fit: Fit) -> float:
    """Return the bytes of the fullest GPU."""
    return fit.peak or 0.0
