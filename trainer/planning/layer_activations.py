"""Measurement of the tensors that decoder layers keep for the backward pass.

It is not put into a formula but counted: a layer runs on tensors without memory, and what autograd
keeps is added up. Where the run will compile the layer, the compiler's own partition is asked.
"""

import copy
from collections.abc import Iterable, Mapping
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

from headrace.schemas.train.model_config import ModelConfig
from headrace.trainer.architecture.half_layer import Half, Span
from headrace.trainer.building.assembly import assemble
from headrace.trainer.building.held_values import lay_out_with_buffers, trained_dtype
from headrace.trainer.building.model_plan import Plan
from headrace.trainer.building.parameter_slots import find_slots
from headrace.trainer.building.partition import StageCut
from headrace.trainer.layers.expert_adapters import swap_expert_adapters
from headrace.trainer.layers.experts import GroupedExperts
from headrace.trainer.layers.layer_functions import run_layer
from headrace.trainer.layers.lora_layers import swap_adapters
from headrace.trainer.layers.rotary_tables import fresh, rotary_tables
from headrace.trainer.layers.selective_checkpoint import KeptBytes
from headrace.trainer.planning.memory_model import LayerActivations
from headrace.trainer.stage.acceleration import (
    CAP,
    attend_by_bounds,
    runs_compiled,
    runs_without_masks,
)
from headrace.trainer.stage.stage import Stage
from headrace.trainer.stage.tiled_mlp import tile_mlps
from headrace.trainer.tensor_parallel.cut_stage import connect_ranks, fit_sizes
from headrace.trainer.tensor_parallel.shard import TensorShard
from headrace.trainer.tensor_parallel.weight_cut import StageCuts

STATE_TOKENS = 256  # of a layer with a state, which keeps in proportion; a chunk of most families


class ExpertsAsOne(nn.Module):
    """Stand-in for a mixture's experts: the work of those chosen, in shapes that are fixed."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        experts: Any = self.experts
        gated, down = hasattr(experts, "gate_up_proj"), experts.down_proj
        up = experts.gate_up_proj if gated else experts.up_proj
        states = nn.functional.linear(hidden.repeat(chosen.shape[-1], 1), up[0])
        if gated:
            gate, rest = states.chunk(2, dim=-1)
            states = nn.functional.silu(gate) * rest
        else:
            states = experts.act_fn(states)
        states = nn.functional.linear(states, down[0])
        states = states * weights.T.reshape(-1, 1).to(states.dtype)
        return states.view(chosen.shape[-1], *hidden.shape).sum(0)


def layer_activations(
    plan: Plan, config: ModelConfig, dtype: torch.dtype, sequence_len: int
) -> LayerActivations:
    """Count what layers keep, each kind of them once."""
    kinds = kinds_of_layers(plan)
    spans: dict[tuple[int, Half | None], Span] = {}
    for layer in dict.fromkeys(kinds):
        spans[layer, None] = Span(2 * layer, 2 * layer + 2)
        in_halves = config.half_layers or isinstance(config.partition, list)
        if in_halves and plan.architecture.family.attention:
            spans[layer, "attention"] = Span(2 * layer, 2 * layer + 1)
            spans[layer, "mlp"] = Span(2 * layer + 1, 2 * layer + 2)
    width = plan.architecture.stream.width
    boundary = config.places * sequence_len * width * dtype.itemsize

    def count(layer: int, span: Span, *, selective: bool = False, tiles: int = 1) -> float:
        tokens = sequence_len
        if plan.architecture.stateful[layer]:
            tokens = min(sequence_len, STATE_TOKENS)
        kept = kept_by(plan, config, span, dtype, tokens, selective=selective, tiles=tiles)
        return kept * sequence_len / tokens

    kept = {key: count(key[0], span) for key, span in spans.items()}
    selected = dict.fromkeys(spans, 0.0)
    if config.activation_checkpointing in ("selective", "attention"):
        selected = {key: count(key[0], span, selective=True) for key, span in spans.items()}
    tile, tiles = 0.0, config.tiles
    if tiles > 1:
        whole = kept
        kept = {key: count(key[0], span, tiles=tiles) for key, span in spans.items()}
        tile = max(max(0.0, whole[key] - kept[key]) for key in spans) / tiles
    return LayerActivations(kinds, kept, selected, float(boundary), tile=tile)


def kinds_of_layers(plan: Plan) -> list[int]:
    """Return of each layer the first one that has the same modules."""
    layers = plan.plain.get_submodule(plan.architecture.family.layers)
    described = [
        tuple((name, type(part), shapes_of(part)) for name, part in layer.named_modules())
        for layer in layers.children()
    ]
    return [described.index(modules) for modules in described]


def shapes_of(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a module's own parameters."""
    return tuple(tuple(p.shape) for p in module._parameters.values() if p is not None)


def kept_by(
    plan: Plan,
    config: ModelConfig,
    layer: Span,
    dtype: torch.dtype,
    sequence_len: int,
    *,
    selective: bool = False,
    tiles: int = 1,
) -> float:
    """Bytes that autograd, or selective recomputation, keeps of one layer, or half of it.

    Args:
        tiles: over which its MLP goes.
    """
    rows, width = config.places, plan.architecture.stream.width
    stage, cuts = lay_out_part(plan, config, layer, dtype)
    fast = config.kernels == "auto"
    adapted = adapted_experts(stage) * dtype.itemsize
    with FakeTensorMode():
        prepare_layer(stage, plan, config, dtype)
        tiled = tiles > 1 and tile_mlps(list(stage.layers), tiles, keeps_chance=False)
        connect_ranks(stage.names, cuts)
        compiles = fast and runs_compiled(stage.layers, config, plan.architecture)
        inputs = torch.zeros(rows, sequence_len, width, dtype=dtype, requires_grad=True)
        hidden, carried = stage.stream.split(inputs)
        positions = torch.zeros(rows, sequence_len, dtype=torch.int64)
        mask = None
        if not (fast and runs_without_masks(plan.architecture, dtype)):
            kind = dtype if stage.additive_mask else torch.bool
            mask = torch.ones(rows, 1, sequence_len, sequence_len, dtype=kind)
        else:
            attend_without_caps(stage)
        masks, further = stage.with_masks({None: mask}, positions, sequence_len)
        further = further | carried.arguments(stage.numbers[0])
        kinds = stage.rotary_types[:1]
        table = rotary_tables(stage.rotary, kinds, hidden, positions, None).get(kinds[0])
        arguments = stage.arguments_of_layer(0, masks[None], positions, table, None, further)
        with torch.autocast("cpu", dtype, enabled=stage.autocast):
            if selective:
                attention = config.activation_checkpointing == "attention"
                offloaded = attention and config.activation_offload
                with KeptBytes(attention=attention, offloaded=offloaded) as results:
                    run_layer(stage.layers[0], hidden, arguments)
                return float(results.bytes)
            run = run_as_compiled if compiles else run_layer
            saved = SavedBytes(stage.parameters())
            with saved_tensors_hooks(saved.note, lambda tensor: tensor):
                output = run(stage.layers[0], hidden, arguments)
        shared = [mask, *further.values(), *(table if isinstance(table, tuple) else [table])]
        for tensor in [value for value in shared if isinstance(value, Tensor)]:
            saved.leave_out(tensor)
        del output
    of_tiles = hidden.nbytes if tiled else 0  # their inputs, which recomputation holds
    return float(saved.bytes + adapted + of_tiles)


class LonelyRank(TensorShard):
    """A rank that sends nothing, and takes the others for copies of itself."""

    def all_reduce(self, tensor: Tensor, *, largest: bool = False) -> Tensor:
        return tensor.detach().clone()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.detach()] * self.ranks


def lay_out_part(
    plan: Plan, config: ModelConfig, layers: Span, dtype: torch.dtype, *, number: int = 1
) -> tuple[Stage, StageCuts]:
    """Return a stage of these layers, whose weights have no memory, as a rank has it; and what of
    them that is.

    Args:
        number: of the stage; 1 is neither the first nor the last.
    """
    initial = lay_out_with_buffers(plan.architecture, dtype)
    cut = StageCut(number, 3, layers)
    rank, cpu = LonelyRank(0, config.tensor_parallel), torch.device("cpu")
    spec = assemble(plan, config, cut, dtype, cpu, initial, shard=rank)
    stage = copy.deepcopy(Stage(spec))
    for slot in find_slots(stage.names):
        part = spec.cuts.part(slot.name, slot.empty.detach())
        slot.fill(nn.Parameter(part, requires_grad=slot.empty.requires_grad))
    fit_sizes(stage.names, spec.cuts)
    return stage, spec.cuts


def prepare_layer(stage: Stage, plan: Plan, config: ModelConfig, dtype: torch.dtype) -> None:
    """Give a stage's weights their types, and its layer the parts that a run swaps in."""
    for module in list(stage.modules()):
        fill_without_memory(module, dtype, trained_dtype(config.optimizer, dtype))
    swap_expert_adapters(stage)
    if config.kernels == "auto":
        swap_adapters(stage.layers[0], may_join=False)
    if stage.rotary is not None:
        stage.rotary = fresh(stage.rotary, plan.architecture.config)


class SavedBytes:
    """Count of the bytes of tensors that autograd saves, those of weights left out."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._seen: dict[int, int] = {}

    def note(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage once, and return the tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._seen[storage._cdata] = storage.nbytes()
        return tensor

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count a tensor that all layers share."""
        self._seen.pop(tensor.untyped_storage()._cdata, None)

    @property
    def bytes(self) -> int:
        """Return their sum."""
        return sum(self._seen.values())


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
    held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    names = list(held)
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
    output: Tensor = partitioned(tuple(held.values()), hidden, tensors)
    return output


def fill_without_memory(module: nn.Module, dtype: torch.dtype, trained: torch.dtype) -> None:
    """Give a module's parameters their types, and its experts shapes that are known."""
    for name, empty in module._parameters.items():
        if empty is not None:
            kind = trained if empty.requires_grad else dtype
            value = torch.empty(empty.shape, dtype=kind)
            module._parameters[name] = nn.Parameter(value, requires_grad=empty.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    for name, child in list(module.named_children()):
        experts = child.get_base_layer() if isinstance(child, ParamWrapper) else child
        unknown = not isinstance(experts, GroupedExperts) and hasattr(experts, "num_experts")
        stacked = getattr(experts, "gate_up_proj", getattr(experts, "up_proj", None))
        if unknown and isinstance(stacked, Tensor):
            setattr(module, name, ExpertsAsOne(experts))
