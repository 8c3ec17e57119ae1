"""Ways in which a module's weights are cut, by the names of transformers' plans: one class each.

Read against transformers 5.23.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn import functional

from headrace.schemas.errors import ConfigError
from headrace.trainer.adapters.names import ADAPTER, ROWS
from headrace.trainer.layers.experts import GroupedExperts
from headrace.trainer.tensor_parallel.shard import TensorShard

MAGNITUDE = "lora_magnitude_vector"  # as PEFT names what DoRA trains beside A and B
HIDDEN = "hidden_states"  # as transformers' modules name their input


def unwrapped(module: Any) -> Any:
    """Return a module without the adapters around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return getattr(module, "original_module", module)


@dataclass(frozen=True)
class Part:
    """The part of a parameter that a rank holds.

    Attributes:
        dim: that is cut; None: the rank holds all of it.
        blocks: see `WeightCut`.
        is_partial: ranks find parts of its gradient, which are to be added up.
    """

    dim: int | None = None
    blocks: int = 1
    is_partial: bool = False


ROWS_OF_IT, COLUMNS_OF_IT, ALIKE, PARTIAL = Part(0), Part(1), Part(), Part(is_partial=True)


class Style:
    """A module that every rank has whole, and whose gradients every rank finds in part."""

    holds: ClassVar[type[nn.Module] | None] = None  # what the module must be, adapters aside
    spreads: ClassVar[bool] = False  # its input is one that all ranks have alike

    def part(self, path: str, parameter: Tensor, module: nn.Module) -> Part:
        """Return what a rank holds of a parameter, given its path below the module.

        Raises:
            ConfigError: it cannot be cut; said without the module's name.
        """
        return PARTIAL

    def fit(self, module: nn.Module, shard: TensorShard) -> None:
        """Let a filled module know the size of the part that it holds; in place."""

    def connect(self, module: nn.Module, shard: TensorShard) -> None:
        """Let a module with its part of the weights exchange states with the others; in place."""


class ColumnStyle(Style):
    """A linear layer cut by outputs; its adapters' B is cut with them."""

    holds = nn.Linear
    spreads = True

    def __init__(self, *, gathers: bool = False) -> None:
        self.gathers = gathers  # outputs are put together again

    def part(self, path: str, parameter: Tensor, module: nn.Module) -> Part:
        return PARTIAL if "lora_A." in path else ROWS_OF_IT

    def fit(self, module: nn.Module, shard: TensorShard) -> None:
        unwrapped(module).out_features //= shard.ranks

    def connect(self, module: nn.Module, shard: TensorShard) -> None:
        if self.gathers:
            module.register_forward_hook(lambda _, args, output: shard.join(output))


class RowStyle(Style):
    """A linear layer cut by inputs; its adapters' A is cut with them."""

    holds = nn.Linear

    def __init__(self, *, splits: bool = False) -> None:
        self.splits = splits  # inputs are whole

    def part(self, path: str, parameter: Tensor, module: nn.Module) -> Part:
        if path.endswith("bias"):
            raise ConfigError("a bias beside inputs that are cut")
        return PARTIAL if "lora_B." in path or MAGNITUDE in path else COLUMNS_OF_IT

    def fit(self, module: nn.Module, shard: TensorShard) -> None:
        unwrapped(module).in_features //= shard.ranks
        dropouts: Any = getattr(module, "lora_dropout", None)
        if dropouts is not None and isinstance(dropouts[ADAPTER], nn.Dropout):
            dropouts[ADAPTER] = WholeDropout(dropouts[ADAPTER].p, shard)

    def connect(self, module: nn.Module, shard: TensorShard) -> None:
        if self.splits:
            module.register_forward_pre_hook(lambda _, args: (shard.own(args[0]), *args[1:]))
        for part in module.modules():
            if type(part) is DoraLinearLayer:
                share_norm(part, shard)
        module.register_forward_hook(lambda _, args, output: shard.total(output))


class ExpertsStyle(Style):
    """The experts of a mixture, of which each rank holds some; tokens are at every rank, which
    multiplies the rows of those that are sent to its own.
    """

    holds = GroupedExperts

    def part(self, path: str, parameter: Tensor, module: nn.Module) -> Part:
        if "lora_B." in path:  # PEFT lays the experts side by side in the ranks of B
            return Part(1, parameter.shape[1] // unwrapped(module).num_experts)
        return ROWS_OF_IT

    def fit(self, module: nn.Module, shard: TensorShard) -> None:
        for part in module.modules():
            if isinstance(part, GroupedExperts):
                part.num_experts //= shard.ranks
            if isinstance(part, GroupedExperts):
                part.is_part = True

    def connect(self, module: nn.Module, shard: TensorShard) -> None:
        held: int = unwrapped(module).num_experts
        start = shard.rank * held

        def own_experts(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, chosen, weights = args
            number = chosen - start
            number = torch.where((number >= 0) & (number < held), number, held)  # of none
            return shard.spread(hidden), number, shard.spread(weights)

        module.register_forward_pre_hook(own_experts)
        module.register_forward_hook(lambda _, args, output: shard.total(output))


class TableStyle(Style):
    """An embedding cut by tokens; the stage itself puts its rows together."""

    def part(self, path: str, parameter: Tensor, module: nn.Module) -> Part:
        if ROWS in path:
            raise ConfigError("rows of single tokens that are trained")
        if MAGNITUDE in path:
            raise ConfigError("magnitudes of an embedding")
        if "lora_embedding_B" in path:
            return PARTIAL
        return COLUMNS_OF_IT if "lora_embedding_A" in path else ROWS_OF_IT

    def fit(self, module: nn.Module, shard: TensorShard) -> None:
        for part in module.modules():
            if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                tokens = part.num_embeddings // shard.ranks
                padding = part.padding_idx - shard.rank * tokens
                part.padding_idx = padding if 0 <= padding < tokens else None


class HeadStyle(ColumnStyle):
    """A head cut by tokens; its loss is computed over the parts."""

    spreads = False  # the loss does

    def part(self, path: str, parameter: Tensor, module: nn.Module) -> Part:
        if ROWS in path:
            raise ConfigError("rows of single tokens that are trained")
        if MAGNITUDE in path:
            raise ConfigError("magnitudes of a head")
        return super().part(path, parameter, module)

    def fit(self, module: nn.Module, shard: TensorShard) -> None:
        """Leave its size, that of the vocabulary."""

    def connect(self, module: nn.Module, shard: TensorShard) -> None:
        """Leave it as it is: `sharded_cross_entropy` knows of the ranks."""


STYLES: dict[str, Style] = {
    "colwise": ColumnStyle(),
    "colwise_gather_output": ColumnStyle(gathers=True),
    "rowwise": RowStyle(),
    "rowwise_split_input": RowStyle(splits=True),
    "replicated_with_grad_allreduce": Style(),
    "moe_tp_experts": ExpertsStyle(),  # whose matrices transformers cuts, and we do not
    "ep_dispatch_experts": ExpertsStyle(),
}


class WholeDropout(nn.Module):
    """Dropout of a part of the features, by the same choices as of all of them."""

    def __init__(self, p: float, shard: TensorShard) -> None:
        super().__init__()
        self.p = p
        self.shard = shard

    def forward(self, states: Tensor) -> Tensor:
        if not self.training:
            return states
        whole = states.new_ones(*states.shape[:-1], states.shape[-1] * self.shard.ranks)
        return states * self.shard.share(functional.dropout(whole, self.p), -1)


class WholeNorm(DoraLinearLayer):
    """DoRA's part beside a weight cut by inputs: norms of rows are those of the whole."""

    shard: TensorShard

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        """Return [outputs], without gradient, as PEFT has it."""
        norms = super().get_weight_norm(weight, lora_weight, scaling)
        return self.shard.all_reduce(norms.float().square()).sqrt().to(norms.dtype)


def share_norm(part: Any, shard: TensorShard) -> None:
    """Let DoRA's part take the norms of whole rows; in place."""
    part.__class__ = WholeNorm
    part.shard = shard


def spread_input(module: nn.Module, shard: TensorShard) -> None:
    """Let a module spread the hidden states that it is called with; in place."""

    def spread(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (shard.spread(args[0]), *args[1:]), kwargs
        return args, {**kwargs, HIDDEN: shard.spread(kwargs[HIDDEN])}

    module.register_forward_pre_hook(spread, with_kwargs=True)
