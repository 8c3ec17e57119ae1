"""Sizes of the parts of a model, read from the model laid out on the meta device."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from headrace.trainer.adapters.names import is_adapter, is_control
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.half_layer import Half, Span, half_of
from headrace.trainer.layers.weight_offload import OFFLOADED, is_offloaded
from headrace.trainer.quantized.modules import QuantizableModule

HALVES: tuple[Half, Half] = ("attention", "mlp")


@dataclass(frozen=True)
class PartSize:
    """Weight counts of one part: a decoder layer, the embedding, or norm and head."""

    weights: int  # all that are held, adapters included
    trained: int  # of these
    active: float  # that multiply a token: of experts only those that it is sent to
    quantized: int = 0  # of all, held quantized
    quantized_bytes: float = 0.0  # what these take
    largest_quantized: int = 0  # weights of the largest matrix that is dequantized for use
    offloadable: Mapping[str, "Frozen"] = field(default_factory=dict)  # by `weight_offload`
    trained_matrices: int = 0  # of the trained, those in two dimensions; of layers only


@dataclass(frozen=True)
class Frozen:
    """Some of a part's frozen weights."""

    weights: int  # that are not quantized
    quantized_bytes: float


@dataclass(frozen=True)
class ModelSize:
    """Weight counts of a whole model, part by part."""

    embedding: PartSize
    layers: list[PartSize]
    halves: list[PartSize]  # attention and MLP of each layer; none where they are side by side
    head: PartSize  # with the last norm; a tied head counts as if it had weights of its own
    hidden_size: int
    vocabulary: int
    tied: bool
    vision: PartSize | None = None  # tower and projector, where the model is run with them
    stacked: int = 0  # first layers that take features of the tower, and stand beside it

    def piece(self, layer: int, half: Half | None) -> PartSize:
        """A decoder layer or half of it."""
        return self.layers[layer] if half is None else self.halves[2 * layer + (half == "mlp")]

    def parts(self, layers: Span, stage: int, stages: int) -> list[PartSize]:
        """List the parts that one stage holds. Alone, it holds a tied embedding once."""
        parts = [self.piece(layer, half) for layer, half in layers.pieces()]
        parts += [self.embedding] * (stage == 0)
        parts += [self.vision] if stage == 0 and self.vision is not None else []
        if stage == stages - 1:
            shared = self.vocabulary * self.hidden_size * (self.tied and stages == 1)
            trained = max(0, self.head.trained - shared)
            head = replace(self.head, weights=self.head.weights - shared, trained=trained)
            if shared and self.head.quantized:
                head = replace(head, quantized=0, quantized_bytes=0.0)
            parts.append(head)
        return parts


def measure(model: nn.Module, architecture: Architecture, prefix: str = "") -> ModelSize:
    """Count a model's weights.

    Args:
        model: on the meta device, with or without adapters; what is trained requires gradients.
        prefix: of the model's own names in it.
    """
    family, config = architecture.family, architecture.config
    layers = model.get_submodule(prefix + family.layers)
    embedding = model.get_submodule(prefix + family.embedding)
    first = [embedding, *(model.get_submodule(prefix + path) for path in family.ends.first)]
    ends = (family.norm, *family.ends.last, family.head)
    last = [model.get_submodule(prefix + path) for path in ends if path]
    sent = expert_share(config)
    return ModelSize(
        embedding=part_size(first, sent, looked_up=True, of_table=True),
        layers=[part_size([layer], sent) for layer in layers.children()],
        halves=[
            part_size([half_of(layer, family, half)], sent)
            for layer in layers.children()
            for half in HALVES
            if family.attention
        ],
        head=part_size(last, sent, of_table=True),
        hidden_size=config.hidden_size,
        vocabulary=config.vocab_size,
        tied=architecture.tied,
        vision=vision_size(model, architecture, prefix),
        stacked=architecture.stacked_layers,
    )


def vision_size(model: nn.Module, architecture: Architecture, prefix: str) -> PartSize | None:
    """Count the weights of tower and projector; None without."""
    if architecture.vision is None:
        return None
    paths = architecture.vision.paths
    return part_size([architecture.part(model, path, prefix) for path in paths], 1.0)


def flops_per_token(size: ModelSize, full: bool) -> float:
    """Return a training step's operations: 4 for each weight that multiplies, 6 if trained.

    Args:
        full: whether the weights themselves are trained.
    """
    active = sum(layer.active for layer in size.layers) + size.head.active
    return (6 if full else 4) * active


def expert_share(config: object) -> float:
    """The share of a mixture's experts that one token is sent to."""
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return chosen / experts if chosen and experts else 1.0


def part_size(
    modules: list[nn.Module], sent: float, looked_up: bool = False, of_table: bool = False
) -> PartSize:
    """The size of some modules together.

    Args:
        looked_up: weights are picked, not multiplied with.
        of_table: they are embedding or head.
    """
    weights = trained = matrices = 0
    active = 0.0
    for module in modules:
        for name, parameter in module.named_parameters():
            weights += parameter.numel()
            trained += parameter.numel() * parameter.requires_grad
            if parameter.requires_grad and parameter.ndim == 2 and not is_control(name):
                matrices += parameter.numel()
            if parameter.ndim > 1 and not is_adapter(name) and not looked_up:
                active += parameter.numel() * (sent if parameter.ndim == 3 else 1.0)
    held = [weight for module in modules for weight in quantized_weights(module)]
    return PartSize(
        weights,
        trained,
        active,
        quantized=sum(shape.numel() for shape, _ in held),
        quantized_bytes=sum(shape.numel() * bits / 8 for shape, bits in held),
        largest_quantized=max((shape.numel() for shape, _ in held), default=0),
        offloadable={wish: frozen_of(modules, wish) for wish in OFFLOADED},
        trained_matrices=0 if of_table else matrices,
    )


def frozen_of(modules: list[nn.Module], wish: str) -> Frozen:
    """Count the weights that would be held in host memory."""
    weights, quantized = 0, 0.0
    for module in modules:
        for path, part in module.named_modules():
            if is_offloaded(f"{path}.", wish):
                bits = part.bits if isinstance(part, QuantizableModule) else {}
                for attribute, parameter in part._parameters.items():
                    if parameter is not None and not parameter.requires_grad:
                        weights += parameter.numel() * (attribute not in bits)
                        quantized += parameter.numel() * bits.get(attribute, 0.0) / 8
    return Frozen(weights, quantized)


def quantized_weights(module: nn.Module) -> Iterator[tuple[torch.Size, float]]:
    """Shape, and bits a weight, of what a module laid out without memory will hold quantized."""
    for part in module.modules():
        if isinstance(part, QuantizableModule):
            for attribute, bits in part.bits.items():
                parameter = part._parameters[attribute]
                if parameter is not None and not parameter.requires_grad:
                    yield parameter.shape, bits
