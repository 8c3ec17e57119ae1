"""Measurement of the tensors that one decoder layer keeps for the backward pass.

It is not put into a formula but counted: a layer runs on tensors without memory, and what autograd
keeps is added up. Where the run will compile the layer, the compiler's own partition is asked.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import (  # type: ignore[import-untyped]
    aot_function,
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.architecture.half_layer import Half, Span
from headrace.trainer.architecture.precision import trained_dtype
from headrace.trainer.building.assembly import assemble
from headrace.trainer.building.held_values import lay_out_with_buffers
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.partition import StageCut
from headrace.trainer.layers.expert_adapters import swap_expert_adapters
from headrace.trainer.layers.experts import GroupedExperts
from headrace.trainer.layers.layer_functions import run_layer
from headrace.trainer.layers.lora_layers import swap_adapters
from headrace.trainer.layers.selective_checkpoint import KeptBytes
from headrace.trainer.stage.acceleration import (
    CAP,
    attend_by_bounds,
    runs_compiled,
    runs_without_masks,
)
from headrace.trainer.stage.stage import Stage


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one decoder layer keeps for the backward pass of one micro-batch."""

    kept: Mapping[Half | None, float]  # without recomputation; of a whole layer, of its halves
    selected: Mapping[Half | None, float]  # with selective recomputation, beside its input
    boundary: float  # its input alone, with recomputation

    def shared(self, ranks: int, key_bytes: float, key_heads: int) -> "LayerActivations":
        """Return those of one of the ranks that share rows.

        Args:
            key_bytes: of the keys and values of whole rows, which are repeated where there are
                fewer key heads than ranks.
        """
        repeated = (ranks // math.gcd(ranks, key_heads) - 1) * key_bytes
        kept = {half: size + (half != "mlp") * repeated for half, size in self.kept.items()}
        return LayerActivations(
            {half: size / ranks for half, size in kept.items()},
            {half: size / ranks for half, size in self.selected.items()},
            self.boundary / ranks,
        )


class ExpertsAsOne(nn.Module):
    """Stand-in for a mixture's experts: the work of those chosen, in shapes that are fixed."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        experts: Any = self.experts
        up, down = experts.gate_up_proj, experts.down_proj
        states = hidden.repeat(chosen.shape[-1], 1)
        gate, rest = nn.functional.linear(states, up[0]).chunk(2, dim=-1)
        states = nn.functional.linear(nn.functional.silu(gate) * rest, down[0])
        states = states * weights.T.reshape(-1, 1).to(states.dtype)
        return states.view(chosen.shape[-1], *hidden.shape).sum(0)


def layer_activations(
    plan: Plan, config: TrainConfig, dtype: torch.dtype, sequence_len: int
) -> LayerActivations:
    """Count what one layer keeps. All layers are taken to be like the one in the middle."""
    middle = 2 * (plan.architecture.config.num_hidden_layers // 2)
    spans: dict[Half | None, Span] = {None: Span(middle, middle + 2)}
    if config.half_layers or isinstance(config.partition, list):
        spans |= {"attention": Span(middle, middle + 1), "mlp": Span(middle + 1, middle + 2)}
    if not plan.architecture.family.attention:
        spans = {None: spans[None]}
    width = plan.architecture.config.hidden_size
    boundary = config.places * sequence_len * width * dtype.itemsize
    kept = {half: kept_by(plan, config, span, dtype, sequence_len) for half, span in spans.items()}
    selected = dict.fromkeys(spans, 0.0)
    if config.activation_checkpointing == "selective":
        selected = {
            half: kept_by(plan, config, span, dtype, sequence_len, selective=True)
            for half, span in spans.items()
        }
    return LayerActivations(kept, selected, float(boundary))


def kept_by(
    plan: Plan,
    config: TrainConfig,
    layer: Span,
    dtype: torch.dtype,
    sequence_len: int,
    *,
    selective: bool = False,
) -> float:
    """Bytes that autograd, or selective recomputation, keeps of one layer, or half of it."""
    rows, width = config.places, plan.architecture.config.hidden_size
    seen: dict[int, int] = {}
    initial = lay_out_with_buffers(plan.architecture, dtype)
    cut = StageCut(1, 3, layer)  # neither the first stage nor the last
    stage = copy.deepcopy(Stage(assemble(plan, config, cut, dtype, torch.device("cpu"), initial)))
    fast = config.kernels == "auto"
    adapted = adapted_experts(stage) * dtype.itemsize
    masked = not (fast and runs_without_masks(plan.architecture, dtype))
    with FakeTensorMode():
        for module in list(stage.modules()):
            fill_without_memory(module, dtype, trained_dtype(config, dtype))
        swap_expert_adapters(stage)
        if fast:
            swap_adapters(stage.layers[0], may_join=False)
        compiles = fast and runs_compiled(stage.layers, config, plan.architecture)
        if stage.rotary is not None:
            stage.rotary = type(stage.rotary)(config=plan.architecture.config)
        weights = {parameter.untyped_storage()._cdata for parameter in stage.parameters()}
        hidden = torch.zeros(rows, sequence_len, width, dtype=dtype, requires_grad=True)
        positions = torch.zeros(rows, sequence_len, dtype=torch.int64)
        mask: Tensor | None = None
        if not masked:
            attend_without_caps(stage)
        else:
            mask = torch.ones(rows, 1, sequence_len, sequence_len, dtype=torch.bool)
        if mask is not None and plan.architecture.attention == "eager":
            mask = mask.to(dtype)

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                seen[storage._cdata] = storage.nbytes()
            return tensor

        table, kind = None, stage.rotary_types[0]
        if stage.rotary is not None:
            table = stage.rotary(hidden, positions, *([kind] if kind else []))
        shared = [*([] if mask is None else [mask]), *(table or ())]
        arguments = stage.arguments_of_layer(0, mask, positions, table)
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=stage.autocast),
        ):
            if selective:
                with KeptBytes() as results:
                    run_layer(stage.layers[0], hidden, arguments)
                return float(results.bytes)
            run = run_as_compiled if compiles else run_layer
            output = run(stage.layers[0], hidden, arguments)
        for tensor in shared:
            seen.pop(tensor.untyped_storage()._cdata, None)
        del output
    return float(sum(seen.values()) + adapted)


def attend_without_caps(stage: Stage) -> None:
    """Let a stage attend as on a GPU, where a kernel caps scores and keeps none of them."""
    attend_by_bounds(stage)
    for part in stage.modules():
        if hasattr(part, CAP):
            setattr(part, CAP, None)


def adapted_experts(module: nn.Module) -> int:
    """Numbers in fused expert weights with adapters: PEFT makes whole adapted weights of them."""
    wrappers = [part for part in module.modules() if isinstance(part, ParamWrapper)]
    others = [part for part in wrappers if not isinstance(part.get_base_layer(), GroupedExperts)]
    return sum(part.get_base_layer()._parameters[part.parameter_name].numel() for part in others)


def run_as_compiled(layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Run a layer through the partition that the compiler makes between forward and backward pass,
    which decides what is kept; nothing is compiled. Read against torch 2.11 to 2.13.
    """
    names, parameters = zip(*layer.named_parameters(), strict=True)
    tensors = {key: value for key, value in arguments.items() if value is not None}

    def run(weights: tuple[Tensor, ...], states: Tensor, given: dict[str, Any]) -> Tensor:
        output = functional_call(
            layer, dict(zip(names, weights, strict=True)), (states,), {**arguments, **given}
        )
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    partitioned = aot_function(
        run,
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    output: Tensor = partitioned(parameters, hidden, tensors)
    return output


def fill_without_memory(module: nn.Module, dtype: torch.dtype, trained: torch.dtype) -> None:
    """Give a module's parameters their types, and its experts shapes that are known."""
    for name, empty in module._parameters.items():
        if empty is not None:
            kind = trained if empty.requires_grad else dtype
            value = torch.empty(empty.shape, dtype=kind)
            module._parameters[name] = nn.Parameter(value, requires_grad=empty.requires_grad)
    for name, child in list(module.named_children()):
        experts = child.get_base_layer() if isinstance(child, ParamWrapper) else child
        unknown = not isinstance(experts, GroupedExperts) and hasattr(experts, "num_experts")
        if unknown and hasattr(experts, "gate_up_proj"):
            setattr(module, name, ExpertsAsOne(experts))
