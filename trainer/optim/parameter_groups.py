"""Groups of trained parameters: which are decayed, and which have a learning rate of their own."""

from collections.abc import Collection, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from headrace.schemas.train.optimizer_config import OptimizerConfig
from headrace.trainer.adapters.names import is_control
from headrace.trainer.building.parameter_slots import TrainedParameter

if TYPE_CHECKING:
    from headrace.trainer.building.built_stage import BuiltStage

ORTHOGONAL = "orthogonal"  # key of a group: hidden matrices, where an optimizer tells them apart
LORA_UP = (".lora_B.", ".lora_embedding_B.")


class Stepped(NamedTuple):
    """A trained weight, and what an optimizer steps of it: the weight itself, or a part."""

    item: TrainedParameter
    parameter: nn.Parameter


def parameter_groups(
    config: OptimizerConfig, stepped: Sequence[Stepped], tables: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return the groups of an optimizer, as torch takes them; a single empty one of no parameters.

    Args:
        tables: names of embeddings and head, whose matrices are not hidden ones.
    """
    groups: dict[tuple[bool, ...], dict[str, Any]] = {}
    for orthogonal, decayed, up in product((False, True), (True, False), (False, True)):
        groups[decayed, up, orthogonal] = {
            "params": [],
            "weight_decay": config.weight_decay if decayed and config.record.decays else 0.0,
            "rate_factor": config.lora_plus_ratio if up else 1.0,
            ORTHOGONAL: orthogonal,
        }
    for item, parameter in stepped:
        orthogonal = config.record.orthogonalizes and is_hidden_matrix(item, tables)
        groups[is_decayed(item), is_up(item.name), orthogonal]["params"].append(parameter)
    used = [group for group in groups.values() if group["params"]]
    return used or [*groups.values()][:1]  # a stage may train none


def is_decayed(item: TrainedParameter) -> bool:
    """Return whether weight decay applies: to matrices only, without those of control adapters."""
    return item.parameter.ndim > 1 and not is_control(item.name)


def is_hidden_matrix(item: TrainedParameter, tables: Collection[str]) -> bool:
    """Return whether a parameter is a matrix, and of no embedding or head."""
    of_table = any(f".{table}." in f".{item.name}." for table in tables)
    return item.parameter.ndim == 2 and not of_table and not is_control(item.name)


def is_up(name: str) -> bool:
    """Return whether a parameter is the B of an adapter."""
    return any(part in f"{name}." for part in LORA_UP)


def table_names(built: "BuiltStage") -> list[str]:
    """List the names of embedding, head and other tables of a stage's model."""
    family = built.architecture.family
    others = [name for name, module in built.names.items() if isinstance(module, nn.Embedding)]
    return [family.embedding, family.head, *others]
