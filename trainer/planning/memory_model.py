"""Model of a stage's peak memory, computed from shapes alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from headrace.kernels.linear_cross_entropy import CHUNK_LOGITS
from headrace.schemas.train.layer_ranges import recomputed_layers
from headrace.schemas.train.model_config import SHARD, ModelConfig
from headrace.schemas.train.optimizers import OFFLOAD_BUCKET, OFFLOAD_BUCKETS
from headrace.trainer.architecture.half_layer import Half, Span
from headrace.trainer.building.held_values import trained_dtype
from headrace.trainer.building.interleaved_schedule import most_held, most_slices
from headrace.trainer.building.model_size import ModelSize, PartSize
from headrace.trainer.layers.weight_offload import PLACES

OFFLOADED_IN_TRANSIT = 3  # layer inputs on their way to the host or back
LOGIT_BYTES = 4 + 2  # float32 for the softmax and its gradient, and the gradient once in bfloat16


Kept = Mapping[tuple[int, Half | None], float]  # of a kind of layer, or of a half of one


@dataclass(frozen=True)
class TowerActivations:
    """Bytes that a vision tower and its projector keep of one micro-batch."""

    kept: float  # for the backward pass, without recomputation
    given: float  # the pictures, which are all that is kept with it

    def held(self, config: ModelConfig) -> float:
        """Return the bytes of all micro-batches in flight, and of the one that runs again."""
        if config.activation_checkpointing == "none":
            return in_flight(config, 0, [self.kept])
        return in_flight(config, 0, [self.given]) + self.kept


NO_TOWER = TowerActivations(0.0, 0.0)  # or a frozen one


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that decoder layers keep for the backward pass of one micro-batch.

    Layers of one kind, of the same modules that is, keep the same.
    """

    kinds: Sequence[int]  # by layer: the first layer of its kind
    kept: Kept  # without recomputation
    selected: Kept  # with selective recomputation, beside its input
    boundary: float  # its input alone, with recomputation
    keys: float = 0.0  # of them, keys and values of whole rows, which slices of rows keep
    tile: float = 0.0  # of one tile of an MLP, while it runs again
    tower: TowerActivations = NO_TOWER

    def kept_of(self, layer: int, half: Half | None) -> float:
        """Return what a layer, or half of it, keeps without recomputation."""
        return self.kept[self.kinds[layer], half]

    def selected_of(self, layer: int, half: Half | None) -> float:
        """Return what it keeps beside its input with selective recomputation."""
        return self.selected[self.kinds[layer], half]

    def shared(self, ranks: int, key_bytes: float, key_heads: int) -> "LayerActivations":
        """Return those of one of the ranks that share rows.

        Args:
            key_bytes: of the keys and values of whole rows, which are repeated where there are
                fewer key heads than ranks.
        """
        repeated = (ranks // math.gcd(ranks, key_heads) - 1) * key_bytes
        kept = {key: size + (key[1] != "mlp") * repeated for key, size in self.kept.items()}
        return LayerActivations(
            self.kinds,
            {key: size / ranks for key, size in kept.items()},
            {key: size / ranks for key, size in self.selected.items()},
            self.boundary / ranks,
            tile=self.tile / ranks,
            tower=self.tower,
        )


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


def stage_memory(
    config: ModelConfig,
    size: ModelSize,
    layers: Sequence[Span],
    stage: int,
    activations: LayerActivations,
    dtype: torch.dtype,
    sequence_len: int,
    copies: int = 1,
) -> StageMemory:
    """The peak of one stage.

    Args:
        copies: ranks that hold the same weights.
        layers: of each chunk of this stage.
        activations: of this rank's slice of rows.
        dtype: of frozen weights and of the computation.
    """
    tokens = config.places * sequence_len // config.sequence_parallel // config.sequence_slices
    parts = parts_of_stage(config, size, layers, stage)
    trained = sum(part.trained for part in parts)
    matrices = sum(part.trained_matrices for part in parts)
    frozen = sum(part.weights - part.quantized for part in parts) - trained
    trained_bytes = trained_dtype(config.optimizer, dtype).itemsize
    dequantized = max(part.largest_quantized for part in parts)  # one at a time, while it is used
    has_reference = config.objective.has_reference
    models = 2 if has_reference and config.adapter.record.trains_base else 1
    is_last = stage == config.pipeline_stages - 1
    mask = config.places * sequence_len**2
    return StageMemory(
        weights=models * (frozen * dtype.itemsize + trained * trained_bytes)
        + sum(part.quantized_bytes for part in parts)
        - elsewhere(config, size, layers, stage, dtype, copies),
        gradients=trained * trained_bytes,
        optimizer=state_bytes(config, trained, matrices, trained_bytes, copies),
        activations=activation_bytes(config, len(size.layers), layers, stage, activations)
        + dequantized * dtype.itemsize,
        logits=head_bytes(size.head, size, tokens, dtype) * is_last,
        masks=in_flight(config, stage, [mask] * len(layers)),
    )


def activation_bytes(
    config: ModelConfig,
    count: int,
    layers: Sequence[Span],
    stage: int,
    activations: LayerActivations,
) -> float:
    """Bytes of all micro-batches in flight, and of the layer that is recomputed.

    Args:
        count: of the model's layers.
    """
    chosen = recomputed_layers(config.activation_checkpointing, count)
    pieces = [span.pieces() for span in layers]
    recomputed = max(
        (activations.kept_of(n, half) for part in pieces for n, half in part if n in chosen),
        default=0.0,
    )
    sent = activations.boundary * (2 if config.objective.has_reference else 1)
    boundary = 0.0 if config.activation_offload else activations.boundary
    kept = [
        2 * sent
        + sum(
            boundary + activations.selected_of(n, half)
            if n in chosen
            else activations.kept_of(n, half)
            for n, half in part
        )
        for part in pieces
    ]
    streams = config.activation_offload * (1 + (config.activation_checkpointing == "attention"))
    in_transit = OFFLOADED_IN_TRANSIT * activations.boundary * streams
    slices = config.sequence_slices
    attending = [(n in chosen) for part in pieces for n, half in part if half != "mlp"]
    has_tower = stage == 0 and activations.tower is not NO_TOWER
    return (
        in_flight(config, stage, kept)
        + (in_transit + recomputed + activations.tile) / slices
        + kept_keys(config, stage, activations.keys, attending)
        + (activations.tower.held(config) if has_tower else 0.0)
    )


def kept_keys(config: ModelConfig, stage: int, keys: float, recomputed: Sequence[bool]) -> float:
    """Bytes of keys and values that slices of rows keep, beside what autograd keeps of them.

    Args:
        keys: of a micro-batch in one layer.
        recomputed: for each layer with attention, whether autograd keeps none of them.
    """
    slices, micro_batches = config.sequence_slices, config.gradient_accumulation_steps
    if slices == 1:
        return 0.0
    held = most_slices(stage, config.pipeline_stages, slices, micro_batches)
    alive = min(micro_batches, 1 + -(-(held - 1) // slices))  # micro-batches, begun and not ended
    gradients = (slices - 1) / slices
    counted = held / slices
    return keys * sum(alive + gradients - (0 if again else counted) for again in recomputed)


def state_bytes(
    config: ModelConfig, trained: int, matrices: int, itemsize: int, copies: int
) -> float:
    """Bytes of the optimizer's states on the device of one rank.

    Args:
        trained: entries of the trained weights.
        matrices: of these, those of hidden matrices.
        copies: ranks that hold the same weights.
    """
    optimizer = config.optimizer
    numbers = optimizer.record.state_numbers(trained, matrices, optimizer.used_momentum)
    if optimizer.shard:
        numbers /= copies
    if optimizer.offload:
        at_once = OFFLOAD_BUCKETS * OFFLOAD_BUCKET * (copies if optimizer.shard else 1)
        numbers *= min(1.0, at_once / max(1, trained))
    return itemsize * numbers


def elsewhere(
    config: ModelConfig,
    size: ModelSize,
    layers: Sequence[Span],
    stage: int,
    dtype: torch.dtype,
    copies: int,
) -> float:
    """Bytes of frozen weights that are in host memory instead, or at the other ranks that would
    hold them; two layers' of a chunk come back.
    """
    saved = 0.0
    if config.embedding_on_cpu and stage == 0:
        saved += size.embedding.weights * dtype.itemsize
    key, wish = config.moved_weights
    if wish != "none":
        share = 1 / copies if key == SHARD else 0.0
        for chunk in layers:
            frozen = [size.piece(layer, half).offloadable[wish] for layer, half in chunk.pieces()]
            held = [part.weights * dtype.itemsize + part.quantized_bytes for part in frozen]
            saved += (1 - share) * sum(held) - PLACES * max(held)
    return saved


def parts_of_stage(
    config: ModelConfig, size: ModelSize, layers: Sequence[Span], stage: int
) -> list[PartSize]:
    """List the parts of the model that one stage holds in all its chunks."""
    numbers = range(stage, config.parts, config.pipeline_stages)
    return [
        part
        for number, chunk in zip(numbers, layers, strict=True)
        for part in size.parts(chunk, number, config.parts)
    ]


def in_flight(config: ModelConfig, stage: int, sizes: Sequence[float]) -> float:
    """Return the activations that a stage holds for backward passes, each of `sizes` by chunk."""
    stages, micro_batches = config.pipeline_stages, config.gradient_accumulation_steps
    if config.schedule == "interleaved":
        return most_held(stage, stages, micro_batches, sizes)
    (size,) = sizes
    slices = config.sequence_slices
    if slices > 1:
        return most_slices(stage, stages, slices, micro_batches) * size / slices
    return float(min(micro_batches, stages - stage) * size)


def head_bytes(head: PartSize, size: ModelSize, tokens: int, dtype: torch.dtype) -> float:
    """Logits of a chunk with their gradient, and the gradients of hidden states and head."""
    chunk = min(tokens, max(1, CHUNK_LOGITS // size.vocabulary))
    weight_gradient = size.vocabulary * size.hidden_size * dtype.itemsize * bool(head.trained)
    logits = chunk * size.vocabulary * (LOGIT_BYTES + dtype.itemsize)
    return float(logits + tokens * size.hidden_size * dtype.itemsize + weight_gradient)
