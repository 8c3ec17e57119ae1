"""Plans of a run that fits this machine: stages, quantization and checkpointing for a model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.jobs.first_run.machine import Fit, Machine
from headrace.schemas.errors import HeadraceError
from headrace.schemas.train.train_config import TrainConfig

if TYPE_CHECKING:
    from headrace.trainer.planning.planned_run import RunPlan

KEPT_FREE = 0.08  # of a GPU's memory: what the driver and fragments take
NF4 = {"backend": "bnb"}
LADDER: tuple[dict[str, Any], ...] = (  # the mildest first
    {},
    {"activation_checkpointing": "full"},
    {"quantization": NF4},
    {"quantization": NF4, "activation_checkpointing": "full"},
    {"quantization": NF4, "activation_checkpointing": "full", "activation_offload": True},
)


def fit(values: dict[str, Any], sequence_len: int, machine: Machine) -> Fit:
    """Return the mildest keys with which a run fits the machine.

    Args:
        values: the config so far, without stages.

    Raises:
        ConfigError: the model is not supported.
    """
    if not machine.gpus:
        check_model(TrainConfig.model_validate(values))
        return Fit(1)
    best: Fit | None = None
    known: dict[bool, RunPlan] = {}  # a model's parts and activations, quantized and not
    for stages, changes in candidates(machine.gpus):
        config = TrainConfig.model_validate({**values, **changes, "pipeline_stages": stages})
        try:
            peak = planned(config, machine.gpus, sequence_len, known).peak
        except HeadraceError:
            if stages == 1 and not changes:
                raise
            continue  # this model cannot be cut or quantized so
        fits = peak <= machine.memory * (1 - KEPT_FREE)
        if fits or best is None or peak < (best.peak or 0):
            best = Fit(stages, changes, peak, fits)
        if fits:
            break
    assert best is not None, "the first candidate is planned or refused"
    return best


def check_model(config: TrainConfig) -> None:
    """Refuse a model that cannot be trained.

    Raises:
        ConfigError: with the reason.
    """
    from headrace.trainer.building.self_check import plan_model

    plan_model(config)


def planned(
    config: TrainConfig, gpus: int, sequence_len: int, known: dict[bool, "RunPlan"]
) -> "RunPlan":
    """Return the plan of a run, with what was counted for others of the same model."""
    from headrace.trainer.building.self_check import plan_model
    from headrace.trainer.planning.run_plan import plan_run

    quantized = config.quantization is not None
    earlier = known.get(quantized)
    plan = earlier.plan if earlier else plan_model(config)
    counted = earlier.activations if earlier else None
    run = plan_run(config, plan, gpus, sequence_len, counted)
    known.setdefault(quantized, run)
    return run


def candidates(gpus: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield stages and keys; fewer stages before more, and both before the next step down."""
    for changes in LADDER:
        for stages in (count for count in range(1, gpus + 1) if gpus % count == 0):
            yield stages, changes
