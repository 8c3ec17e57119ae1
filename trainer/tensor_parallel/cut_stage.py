"""The weights of a stage that ranks share, by transformers' own plan (`base_model_tp_plan`)."""

import re
from collections.abc import Iterator, Mapping

from torch import nn

from headrace.schemas.errors import ConfigError
from headrace.trainer.adapters.names import PEFT_PREFIX, base_name
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.tensor_parallel.shard import TensorShard
from headrace.trainer.tensor_parallel.styles import (
    STYLES,
    HeadStyle,
    SpreadInputs,
    Style,
    TableStyle,
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


def styled(
    modules: Mapping[str, nn.Module], styles: Mapping[str, Style]
) -> Iterator[tuple[str, nn.Module, Style]]:
    """Yield the modules below named ones that have a style, adapters included, with whole names."""
    for prefix, module in modules.items():
        for name, part in module.named_modules(remove_duplicate=False):
            whole = ".".join(filter(None, (prefix, name)))
            style = styles.get(NUMBER.sub("*", whole.removeprefix(PEFT_PREFIX)))
            if style is not None:
                yield whole, part, style


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
    styles = plan_of(architecture, prefix)
    cuts: dict[str, WeightCut] = {}
    partial = set()
    for whole, module, style in styled(modules, styles):
        check_kind(whole, module, style, architecture)
        for path, parameter in module.named_parameters():
            name = f"{whole}.{path}"
            try:
                part = style.part(path, parameter, module)
            except ConfigError as error:
                reason = f"{error} ({base_name(name)})"
                raise refused(architecture.config.model_type, reason) from None
            if part.is_partial:
                partial.add(name)
            if part.dim is not None:
                check_divides(name, parameter.shape[part.dim] // part.blocks, part.dim, shard.ranks)
                cuts[name] = WeightCut(shard, parameter.shape, part.dim, part.blocks)
    return StageCuts(shard, styles, cuts, frozenset(partial))


def check_kind(name: str, module: nn.Module, style: Style, architecture: Architecture) -> None:
    """Check that a module is of the kind that its style cuts.

    Raises:
        ConfigError: naming it.
    """
    module = unwrapped(module)
    if style.holds is not None and not isinstance(module, style.holds):
        reason = f"{base_name(name)} is a {type(module).__name__}"
        raise refused(architecture.config.model_type, reason)


def check_divides(name: str, size: int, dim: int, ranks: int) -> None:
    """Check that the ranks divide a dimension.

    Raises:
        ConfigError: naming the weight.
    """
    if size % ranks:
        raise ConfigError(
            f"tensor_parallel = {ranks} does not divide the {size} {'inputs' if dim else 'rows'} "
            f"of {base_name(name)}; use a divisor"
        )


def fit_sizes(modules: Mapping[str, nn.Module], cuts: StageCuts) -> None:
    """Let filled modules know the sizes of the parts that they hold; in place."""
    for _, module, style in styled(modules, cuts.styles):
        style.fit(module, cuts.shard)


def connect_ranks(modules: Mapping[str, nn.Module], cuts: StageCuts) -> None:
    """Let the modules of a filled stage exchange states with the other ranks; in place."""
    beside: dict[str, SpreadInputs] = {}
    for whole, module, style in styled(modules, cuts.styles):
        inputs = beside.setdefault(whole.rpartition(".")[0], SpreadInputs(cuts.shard))
        style.connect(module, cuts.shard, inputs)
