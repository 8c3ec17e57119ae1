"""Sizes of the parts of a model, read from the model laid out on the meta device."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

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


# ranks that share a weight, by the id of its parameter; 1 where it is not there
Ranks = Mapping[int, int]
UNSHARED: Ranks = MappingProxyType({})


def measure(
    model: nn.Module, architecture: Architecture, prefix: str = "", ranks: Ranks = UNSHARED
) -> ModelSize:
    """Count a model's weights, or those of one of the ranks that share them.

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
    size_of = partial(part_size, sent=expert_share(config), ranks=ranks)
    of_tokens = max(ranks.get(id(parameter), 1) for parameter in embedding.parameters())
    return ModelSize(
        embedding=size_of(first, looked_up=True, of_table=True),
        layers=[size_of([layer]) for layer in layers.children()],
        halves=[
            size_of([half_of(layer, family, half)])
            for layer in layers.children()
            for half in HALVES
            if family.attention
        ],
        head=size_of(last, of_table=True),
        hidden_size=config.hidden_size,
        vocabulary=config.vocab_size // of_tokens,
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
    """The share of a mixture's experts that one token is sent to, the mean over its layers."""
    chosen = mean_of(getattr(config, "num_experts_per_tok", None))
    experts = mean_of(getattr(config, "num_local_experts", None))
    experts = experts or mean_of(getattr(config, "num_experts", None))
    return chosen / experts if chosen and experts else 1.0


def mean_of(setting: Any) -> float:
    """Return a setting that is one number, or the mean of one for each layer; 0 without."""
    numbers = setting if isinstance(setting, list) else [setting]
    return float(sum(number or 0 for number in numbers)) / max(1, len(numbers))


def part_size(
    modules: list[nn.Module],
    sent: float,
    looked_up: bool = False,
    of_table: bool = False,
    ranks: Ranks = UNSHARED,
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
            count = numbers(parameter, ranks)
            weights += count
            trained += count * parameter.requires_grad
            if parameter.requires_grad and parameter.ndim == 2 and not is_control(name):
                matrices += count
            if parameter.ndim > 1 and not is_adapter(name) and not looked_up:
                active += count * (sent if parameter.ndim == 3 else 1.0)
    held = [weight for module in modules for weight in quantized_weights(module, ranks)]
    return PartSize(
        weights,
        trained,
        active,
        quantized=sum(count for count, _ in held),
        quantized_bytes=sum(count * bits / 8 for count, bits in held),
        largest_quantized=max((count for count, _ in held), default=0),
        offloadable={wish: frozen_of(modules, wish, ranks) for wish in OFFLOADED},
        trained_matrices=0 if of_table else matrices,
    )


def numbers(parameter: Tensor, ranks: Ranks) -> int:
    """Count the numbers of a parameter that a rank holds."""
    return parameter.numel() // ranks.get(id(parameter), 1)


def frozen_of(modules: list[nn.Module], wish: str, ranks: Ranks) -> Frozen:
    """Count the weights that would be held in host memory."""
    weights, quantized = 0, 0.0
    for module in modules:
        for path, part in module.named_modules():
            if is_offloaded(f"{path}.", wish):
                bits = part.bits if isinstance(part, QuantizableModule) else {}
                for attribute, parameter in part._parameters.items():
                    if parameter is not None and not parameter.requires_grad:
                        count = numbers(parameter, ranks)
                        weights += count * (attribute not in bits)
                        quantized += count * bits.get(attribute, 0.0) / 8
    return Frozen(weights, quantized)


def quantized_weights(module: nn.Module, ranks: Ranks) -> Iterator[tuple[int, float]]:
    """Numbers, and bits a weight, of what a module laid out without memory will hold quantized."""
    for part in module.modules():
        if isinstance(part, QuantizableModule):
            for attribute, bits in part.bits.items():
                parameter = part._parameters[attribute]
                if parameter is not None and not parameter.requires_grad:
                    yield numbers(parameter, ranks), bits
