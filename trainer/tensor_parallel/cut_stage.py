"""The weights of a stage that ranks share, by transformers' own plan (`base_model_tp_plan`)."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from headrace.schemas.errors import ConfigError
from headrace.trainer.adapters.names import PEFT_PREFIX, base_name
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.tensor_parallel.shard import TensorShard
from headrace.trainer.tensor_parallel.styles import (
    STYLES,
    ColumnStyle,
    HeadStyle,
    Part,
    Style,
    TableStyle,
    spread_input,
    unwrapped,
)
from headrace.trainer.tensor_parallel.weight_cut import StageCuts, WeightCut

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a name
INSIDE = (".experts.",)  # of which transformers' plans name the weights as well


def plan_of(architecture: Architecture, prefix: str) -> dict[str, Style]:
    """Return the styles of a model's modules, by their names with numbers of layers left open.

    Args:
        prefix: of the base model in the whole.

    Raises:
        ConfigError: transformers has no plan for it, or one with a style that is not known.
    """
    config = architecture.config
    plans = {**(config.base_model_tp_plan or {}), **(config.base_model_ep_plan or {})}
    styles: dict[str, Style] = {}
    for path, style in plans.items():
        if any(part in path for part in INSIDE):
            continue
        if style not in STYLES:
            raise refused(config.model_type, f'transformers cuts {path} by "{style}"')
        styles[f"{prefix}.{path}"] = STYLES[style]
    if not styles:
        raise refused(config.model_type, "transformers has no plan of how to cut it")
    family = architecture.family
    return {**styles, family.embedding: TableStyle(), family.head: HeadStyle()}


def refused(model_type: str, reason: str) -> ConfigError:
    """Return the error for a model whose weights cannot be cut."""
    return ConfigError(
        f'tensor_parallel does not go with model_type "{model_type}": {reason}; use more '
        "pipeline_stages or sequence_parallel in its place"
    )


class Styled(NamedTuple):
    """A module with a style, adapters included, by its name in the whole model."""

    name: str
    module: nn.Module
    parent: nn.Module
    style: Style


def styled(modules: Mapping[str, nn.Module], styles: Mapping[str, Style]) -> Iterator[Styled]:
    """Yield the modules below named ones that have a style."""
    for prefix, module in modules.items():
        parts = dict(module.named_modules(remove_duplicate=False))
        for name, part in parts.items():
            whole = ".".join(filter(None, (prefix, name)))
            style = styles.get(NUMBER.sub("*", whole.removeprefix(PEFT_PREFIX)))
            if style is not None:
                yield Styled(whole, part, parts[name.rpartition(".")[0]], style)


def cut_stage(
    modules: Mapping[str, nn.Module], architecture: Architecture, prefix: str, shard: TensorShard
) -> StageCuts:
    """Say what a rank holds of a stage whose parameters have no memory yet.

    Args:
        modules: of the stage, with adapters, by their names in the whole model.
        prefix: of the base model in the whole.

    Raises:
        ConfigError: a weight that the ranks do not divide, or that cannot be cut.
    """
    if shard.is_whole:
        return StageCuts()
    styles, model_type = plan_of(architecture, prefix), architecture.config.model_type
    cuts: dict[str, WeightCut] = {}
    partial: set[str] = set()
    for found in styled(modules, styles):
        check_kind(found, model_type)
        check_heads(found, shard.ranks)
        for path, parameter in found.module.named_parameters():
            name = f"{found.name}.{path}"
            part = part_of(found, path, parameter, model_type)
            if part.is_partial:
                partial.add(name)
            if part.dim is not None:
                check_divides(name, parameter, part, shard.ranks)
                cuts[name] = WeightCut(shard, parameter.shape, part.dim, part.blocks)
    return StageCuts(shard, styles, cuts, frozenset(partial))


def part_of(found: Styled, path: str, parameter: Tensor, model_type: str) -> Part:
    """Return what a rank holds of a parameter below a module.

    Raises:
        ConfigError: it cannot be cut.
    """
    try:
        return found.style.part(path, parameter, found.module)
    except ConfigError as error:
        name = base_name(f"{found.name}.{path}")
        raise refused(model_type, f"{error} ({name})") from None


def check_kind(found: Styled, model_type: str) -> None:
    """Check that a module is of the kind that its style cuts.

    Raises:
        ConfigError: naming it.
    """
    module, kind = unwrapped(found.module), found.style.holds
    if kind is not None and not isinstance(module, kind):
        raise refused(model_type, f"{base_name(found.name)} is a {type(module).__name__}")


def check_heads(found: Styled, ranks: int) -> None:
    """Check that the ranks divide the heads of an attention.

    Raises:
        ConfigError: naming the layer that makes them.
    """
    size, style = getattr(found.parent, "head_dim", None), found.style
    if not (isinstance(style, ColumnStyle) and not style.gathers and isinstance(size, int)):
        return
    heads, rest = divmod(unwrapped(found.module).out_features, size)
    if heads % ranks and not rest:
        raise ConfigError(
            f"tensor_parallel = {ranks} does not divide the {heads} heads of "
            f"{base_name(found.name)}; use a divisor of them, or more pipeline_stages"
        )


def check_divides(name: str, parameter: Tensor, part: Part, ranks: int) -> None:
    """Check that the ranks divide the dimension of a weight that is cut.

    Raises:
        ConfigError: naming the weight.
    """
    assert part.dim is not None
    size = parameter.shape[part.dim] // part.blocks
    if size % ranks:
        raise ConfigError(
            f"tensor_parallel = {ranks} does not divide the {size} "
            f"{'inputs' if part.dim else 'rows'} of {base_name(name)}; use a divisor"
        )


def fit_sizes(modules: Mapping[str, nn.Module], cuts: StageCuts) -> None:
    """Let filled modules know the sizes of the parts that they hold; in place."""
    for found in styled(modules, cuts.styles):
        found.style.fit(found.module, cuts.shard)


def connect_ranks(modules: Mapping[str, nn.Module], cuts: StageCuts) -> None:
    """Let the modules of a filled stage exchange states with the other ranks; in place."""
    beside: dict[str, list[Styled]] = {}
    for found in styled(modules, cuts.styles):
        found.style.connect(found.module, cuts.shard)
        beside.setdefault(found.name.rpartition(".")[0], []).append(found)
    for group in beside.values():
        for module in spreading(group):
            spread_input(module, cuts.shard)


def spreading(group: list[Styled]) -> list[nn.Module]:
    """Return where inputs are to be spread: around modules that all have a style, once for all of
    them, so that gradients are added up once over the ranks; else at each that asks for it.

    Args:
        group: the modules with a style that lie in one parent.
    """
    readers = [found.module for found in group if found.style.spreads]
    parent, known = group[0].parent, {id(found.module) for found in group}
    children = [child for child in parent.children() if any(True for _ in child.parameters())]
    covers = readers and all(id(child) in known for child in children)
    return [parent] if covers else readers
