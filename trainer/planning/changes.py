"""Changes of a config, as `headrace plan` proposes them."""

from collections.abc import Mapping
from typing import Any

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.schemas.train.train_config import TrainConfig
from headrace.schemas.train.train_rules import check_rules
from headrace.trainer.building.assembly import check_parts
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.planning.planned_run import RunPlan, TriedModel

MOST_PARTS = 8  # ranks that share weights: as many GPUs as a machine has

NESTED = "optimizer."


def with_changes(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Return a config with other values for some keys, of which those of optimizers have a dot."""
    of_optimizer = {
        key.removeprefix(NESTED): value for key, value in changes.items() if key.startswith(NESTED)
    }
    others = {key: value for key, value in changes.items() if not key.startswith(NESTED)}
    if of_optimizer:
        others["optimizer"] = config.optimizer.model_copy(update=of_optimizer)
    return config.model_copy(update=others)


def toml(value: object) -> str:
    """A setting as a config has it."""
    if isinstance(value, QuantizationConfig):
        return '{ backend = "bnb", double_quantization = true }'
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def goes_together(config: TrainConfig, plan: Plan) -> bool:
    """Return whether settings go together, and with a model whose weights they cut."""
    try:
        check_rules(config)
        check_parts(config, plan)
    except (ValueError, ConfigError):
        return False
    return True


def parts_of_weights(run: RunPlan, gpus: int, tried: TriedModel) -> list[int]:
    """List the numbers of ranks, above 1, that could share the weights of a model."""
    fitting = [n for n in range(2, min(gpus, MOST_PARTS) + 1) if gpus % n == 0]
    configs = {ranks: with_changes(run.config, {"tensor_parallel": ranks}) for ranks in fitting}
    found = [ranks for ranks, config in configs.items() if goes_together(config, run.plan)]
    return found if found and tried.divides_weights else []
