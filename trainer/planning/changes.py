"""Changes of a config, as `headrace plan` proposes them."""

from collections.abc import Mapping
from typing import Any

from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.schemas.train.train_config import TrainConfig

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
