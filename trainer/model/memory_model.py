"""What a stage's memory will hold at its peak, from shapes alone.

A decoder layer's activations are not put into a formula but counted: one layer runs on tensors
without memory, and what autograd keeps for the backward pass is added up.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from headrace.kernels.linear_cross_entropy import CHUNK_LOGITS
from headrace.schemas.layer_ranges import recomputed_layers
from headrace.schemas.train_config import TrainConfig
from headrace.trainer.model.assembly import assemble
from headrace.trainer.model.half_layer import Half
from headrace.trainer.model.model_plan import Plan
from headrace.trainer.model.model_size import ModelSize, PartSize
from headrace.trainer.model.partition import Span

TRAINED_BYTES = 4  # weights that are trained are float32, and so are
GRADIENT_BYTES = 4
MOMENT_BYTES = 8  # Adam's two; of other optimisers:
MOMENT_BYTES_OF = {"adamw_8bit": 2, "adamw_8bit_paged": 2, "lion": 4, "adafactor": 0}
OFFLOADED_IN_TRANSIT = 3  # layer inputs on their way to the host or back
LOGIT_BYTES = 4 + 2  # float32 for the softmax and its gradient, and the gradient once in bfloat16


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one process at its peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # of all micro-batches in flight, and of the layer that is recomputed
    logits: float
    masks: float

    @property
    def peak(self) -> float:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.masks
        )


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one decoder layer keeps for the backward pass of one micro-batch."""

    kept: Mapping[Half | None, float]  # without recomputation; of a whole layer, of its halves
    boundary: float  # its input alone, with recomputation


class ExpertsAsOne(nn.Module):
    """As much work as a mixture's chosen experts do, with shapes that do not depend on data."""

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
    """Count what one layer keeps. All layers are taken to be like the one in the middle.

    Adapters on fused experts are left out: PEFT makes whole adapted weights of them in passing.
    """
    middle = 2 * (plan.architecture.config.num_hidden_layers // 2)
    spans: dict[Half | None, Span] = {None: Span(middle, middle + 2)}
    if config.half_layers or isinstance(config.partition, list):
        spans |= {"attention": Span(middle, middle + 1), "mlp": Span(middle + 1, middle + 2)}
    if not plan.architecture.family.attention:
        spans = {None: spans[None]}
    width = plan.architecture.config.hidden_size
    boundary = config.places * sequence_len * width * dtype.itemsize
    kept = {half: kept_by(plan, config, span, dtype, sequence_len) for half, span in spans.items()}
    return LayerActivations(kept, float(boundary))


def kept_by(
    plan: Plan, config: TrainConfig, layer: Span, dtype: torch.dtype, sequence_len: int
) -> float:
    """Bytes that autograd keeps of one layer, or half of it."""
    rows, width = config.places, plan.architecture.config.hidden_size
    seen: dict[int, int] = {}
    stages = config.model_copy(update={"pipeline_stages": 3})
    stage = copy.deepcopy(assemble(plan, stages, 1, layer, dtype, torch.device("cpu")))
    with FakeTensorMode():
        for module in list(stage.modules()):
            fill_without_memory(module, dtype)
        if stage.rotary is not None:
            stage.rotary = type(stage.rotary)(config=plan.architecture.config)
        weights = {parameter.untyped_storage()._cdata for parameter in stage.parameters()}
        hidden = torch.zeros(rows, sequence_len, width, dtype=dtype, requires_grad=True)
        positions = torch.zeros(rows, sequence_len, dtype=torch.int64)
        mask = torch.ones(rows, 1, sequence_len, sequence_len, dtype=torch.bool)
        if plan.architecture.attention == "eager":
            mask = mask.to(dtype)

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                seen[storage._cdata] = storage.nbytes()
            return tensor

        table, kind = None, stage.rotary_types[0]
        if stage.rotary is not None:
            table = stage.rotary(hidden, positions, *([kind] if kind else []))
        shared = [mask, *(table or ())]
        arguments = stage.arguments_of_layer(mask, positions, table)
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=stage.autocast),
        ):
            output = stage.layer_functions.once(stage.layers[0], hidden, arguments)
        for tensor in shared:
            seen.pop(tensor.untyped_storage()._cdata, None)
        del output
    return float(sum(seen.values()))


def fill_without_memory(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a module's parameters their types, and its experts shapes that are known."""
    for name, empty in module._parameters.items():
        if empty is not None:
            kind = torch.float32 if empty.requires_grad else dtype
            value = torch.empty(empty.shape, dtype=kind)
            module._parameters[name] = nn.Parameter(value, requires_grad=empty.requires_grad)
    for name, child in list(module.named_children()):
        if hasattr(child, "gate_up_proj") and hasattr(child, "num_experts"):
            setattr(module, name, ExpertsAsOne(child))


def stage_memory(
    config: TrainConfig,
    size: ModelSize,
    layers: Span,
    stage: int,
    activations: LayerActivations,
    dtype: torch.dtype,
    sequence_len: int,
) -> StageMemory:
    """The peak of one stage.

    Args:
        layers: of this stage.
        dtype: of frozen weights and of the computation.
    """
    stages, tokens = config.pipeline_stages, config.places * sequence_len
    parts = size.parts(layers, stage, stages)
    trained = sum(part.trained for part in parts)
    quantized = sum(part.quantized for part in parts)
    frozen = sum(part.weights for part in parts) - trained - quantized
    dequantized = max(part.largest_quantized for part in parts)  # one at a time, while it is used
    has_reference = config.objective.has_reference
    copies = 2 if has_reference and config.adapter.kind in ("none", "blocks") else 1
    in_flight = min(config.gradient_accumulation_steps, stages - stage)
    chosen = recomputed_layers(config.activation_checkpointing, len(size.layers))
    again = [half for layer, half in layers.pieces() if layer in chosen]
    once = [half for layer, half in layers.pieces() if layer not in chosen]
    sent = activations.boundary * (2 if has_reference else 1)
    kept = sum(activations.kept[half] for half in once) + 2 * sent
    recomputed = max((activations.kept[half] for half in again), default=0.0)
    if config.activation_offload:
        boundaries = OFFLOADED_IN_TRANSIT * activations.boundary
    else:
        boundaries = in_flight * len(again) * activations.boundary
    return StageMemory(
        weights=copies * (frozen * dtype.itemsize + trained * TRAINED_BYTES)
        + sum(part.quantized_bytes for part in parts),
        gradients=trained * GRADIENT_BYTES,
        optimizer=trained * MOMENT_BYTES_OF.get(config.optimizer.type, MOMENT_BYTES),
        activations=in_flight * kept + boundaries + recomputed + dequantized * dtype.itemsize,
        logits=head_bytes(size.head, size, tokens, dtype) * (stage == stages - 1),
        masks=float(in_flight * config.places * sequence_len**2),
    )


def head_bytes(head: PartSize, size: ModelSize, tokens: int, dtype: torch.dtype) -> float:
    """Logits of a chunk with their gradient, and the gradients of hidden states and head."""
    chunk = min(tokens, max(1, CHUNK_LOGITS // size.vocabulary))
    weight_gradient = size.vocabulary * size.hidden_size * dtype.itemsize * bool(head.trained)
    logits = chunk * size.vocabulary * (LOGIT_BYTES + dtype.itemsize)
    return float(logits + tokens * size.hidden_size * dtype.itemsize + weight_gradient)
