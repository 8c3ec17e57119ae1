"""Gives every parameter of a stage its memory and its values, one at a time."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn

from headrace.schemas.train.model_config import ModelConfig
from headrace.trainer.adapters.method import TuningMethod
from headrace.trainer.adapters.names import ADAPTER, base_name, is_adapter, rows_name
from headrace.trainer.adapters.token_rows import row_adapters
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.model_files import Slice
from headrace.trainer.building.held_values import HeldTypes, trained_dtype
from headrace.trainer.building.parameter_slots import (
    BufferSlot,
    Slot,
    TrainedParameter,
    find_slots,
    holds_quantized,
    stored_buffers,
)
from headrace.trainer.building.weight_source import WeightSource
from headrace.trainer.layers.expert_adapters import swap_expert_adapters
from headrace.trainer.layers.weight_offload import is_offloaded
from headrace.trainer.quantized.frozen_weight import FrozenWeight, Quantizer
from headrace.trainer.quantized.modules import QuantizableModule, quantized_weights_of
from headrace.trainer.stage.spec import StageSpec
from headrace.trainer.tensor_parallel.cut_stage import fit_sizes
from headrace.trainer.tensor_parallel.weight_cut import StageCuts


@dataclass(frozen=True)
class Filled:
    """Result of `Materializer.fill`."""

    trained: list[TrainedParameter]
    tied_head: nn.Parameter | None  # a trained head over the memory of its stage's embedding
    initial: dict[str, Tensor]  # adapters as they started, where they took over frozen weights


class LayerCache(Protocol):
    """Quantized decoder layers of earlier runs."""

    def load(self, layer: str, wanted: Sequence[str]) -> Mapping[str, FrozenWeight] | None:
        """Return the quantized weights of a layer by name; None if they are not there."""

    def store(self, layer: str, weights: Mapping[str, FrozenWeight]) -> None:
        """Keep a layer's weights."""


class Materializer:
    """Fills a stage that was laid out on the meta device.

    Frozen weights and buffers get the types that transformers gives them, trained ones
    `trained_dtype` if that is not narrower; frozen ones in modules that can hold
    them quantized are quantised one by one, before the next is read.
    """

    def __init__(
        self,
        config: ModelConfig,
        architecture: Architecture,
        source: WeightSource,
        types: HeldTypes,
        device: torch.device,
        method: TuningMethod,
        quantization: Quantizer | None = None,
        cache: LayerCache | None = None,
    ) -> None:
        self.config = config
        self.architecture = architecture
        self.source = source
        self.types = types
        self.dtype = types.dtype
        self.trained_dtype = trained_dtype(config.optimizer, self.dtype)
        self.device = device
        self.method = method
        self.quantization = quantization
        self.cache = cache
        self._adapted: dict[int, tuple[str, nn.Module]] = {}  # frozen module -> its adapter
        self._measured: dict[int, tuple[str, nn.Module]] = {}  # likewise, while it is whole
        self._from_cache: set[str] = set()
        self._cuts = StageCuts()
        self._taken: dict[str, dict[str, Tensor]] = {}  # adapters begun while weights were whole
        self.embedding_name = f"{architecture.family.embedding}.weight"
        self.head_name = f"{architecture.family.head}.weight"

    def fill(self, stage: StageSpec) -> Filled:
        """Load or initialize all parameters."""
        slots = list(find_slots(stage.modules))
        self._cuts = stage.cuts
        self._adapted = self.method.taking_over(stage.modules)
        if self._cuts.cuts:
            self._measured = self.method.measuring(stage.modules)
        base = [slot for slot in slots if not is_adapter(slot.name)]
        tied_head = self._fill_base(self._fill_from_cache(base))
        self._fill_buffers(stored_buffers(stage.modules))
        self._fill_cache(stage)
        initial = self._fill_adapters(stage)
        if tied_head is None:
            tied_head = self._share_rows(stage)
        swap_expert_adapters(stage.tree)
        fit_sizes(stage.modules, self._cuts)
        left = [name for name, tensor in stage.tree.named_parameters() if tensor.is_meta]
        left += [name for name, tensor in stage.tree.named_buffers() if tensor.is_meta]
        assert not left, f"not loaded: {left}"
        trained = [
            self._trained(slot, slot.owner._parameters[slot.attribute])
            for slot in slots
            if slot.empty.requires_grad and slot.owner._parameters[slot.attribute] is not tied_head
        ]
        return Filled(trained, tied_head, initial)

    def place(self, slot: Slot, value: Tensor | FrozenWeight) -> None:
        """Put a weight of the base model where it belongs, in its type, on its device."""
        trained = slot.empty.requires_grad
        if holds_quantized(slot):
            self._hold(slot, value)
            return
        if isinstance(value, FrozenWeight):
            value = value.to(self.device).dequantize(self.dtype)
        dtype = self.types.of(self._source_name(slot.name))
        if trained:
            dtype = torch.promote_types(dtype, self.trained_dtype)
        if id(slot.owner) in self._measured and slot.attribute == "weight":
            slot.fill(nn.Parameter(value.to(self.device, dtype), requires_grad=False))
            self._measure(slot)
        value = self._cuts.part(slot.name, value).to(self._home(slot), dtype)
        slot.fill(nn.Parameter(value, requires_grad=trained))

    def _measure(self, slot: Slot) -> None:
        """Take an adapter's initial values from the whole weight that its module has now."""
        name, layer = self._measured[id(slot.owner)]
        self._taken[name] = self.method.initial_values(name, layer)

    def _hold(self, slot: Slot, value: Tensor | FrozenWeight) -> None:
        """Quantize a weight, unless its file has it so; what adapters take over is taken first."""
        assert isinstance(slot.owner, QuantizableModule) and self.quantization is not None
        dtype = self.quantization.compute_dtype(self.dtype)
        if isinstance(value, FrozenWeight):
            slot.owner.set_quantized(slot.attribute, self._part(slot, value), dtype)
            return
        value = value.to(self.device)
        adapted = self._adapted.get(id(slot.owner))
        if adapted is not None and not self.method.compensates:
            name, layer = adapted
            whole = nn.Parameter(value.float(), requires_grad=False)
            slot.fill(whole)
            self._taken[name] = self.method.initial_values(name, layer)
            value = whole.data
        name = self._source_name(slot.name)
        held = slot.owner.as_held(value)
        made = self.quantization.make(held, name, dtype)
        if adapted is not None and self.method.compensates:
            lost = held.float() - made.dequantize(torch.float32)
            self._taken[adapted[0]] = self.method.compensating_values(*adapted, lost)
        if id(slot.owner) in self._measured:
            slot.owner.set_quantized(slot.attribute, made, dtype)
            self._measure(slot)
        slot.owner.set_quantized(slot.attribute, self._part(slot, made), dtype)

    def _part(self, slot: Slot, value: FrozenWeight) -> FrozenWeight:
        """Return what is held here of a quantized weight, where it is held."""
        cut = self._cuts.cuts.get(slot.name)
        held = value if cut is None else value.part(cut.dim, cut.shard.rank, cut.shard.ranks)
        return held.to(self._home(slot))

    def _home(self, slot: Slot) -> torch.device:
        """The device, or the host for what is kept there."""
        name, config = slot.name, self.config
        if slot.empty.requires_grad:
            return self.device
        is_embedding = base_name(name) == self.embedding_name
        in_layers = base_name(name).startswith(f"{self._layers}.")
        offloaded = in_layers and is_offloaded(name, config.moved_weights[1])
        at_host = offloaded or (is_embedding and config.embedding_on_cpu)
        return torch.device("cpu") if at_host else self.device

    def _fill_from_cache(self, slots: list[Slot]) -> list[Slot]:
        """Take quantized weights of decoder layers from the cache; returns the slots left."""
        if self.cache is None or self.quantization is None:
            return slots
        dtype, left = self.quantization.compute_dtype(self.dtype), []
        for layer, group in groupby(slots, key=lambda slot: self._layer_of(slot.name)):
            group_slots = list(group)
            wanted = {
                self._source_name(slot.name): slot for slot in group_slots if holds_quantized(slot)
            }
            found = self.cache.load(layer, list(wanted)) if layer and wanted else None
            if layer and found:
                self._from_cache.add(layer)
            for name, value in (found or {}).items():
                slot = wanted[name]
                assert isinstance(slot.owner, QuantizableModule)
                slot.owner.set_quantized(slot.attribute, value.to(self._home(slot)), dtype)
            left += [slot for slot in group_slots if not (found and holds_quantized(slot))]
        return left

    def _fill_cache(self, stage: StageSpec) -> None:
        """Keep what was quantized, a file for each decoder layer."""
        if self.cache is None:
            return
        for name in stage.names.layers:
            held = dict(quantized_weights_of({name: stage.modules[name]}))
            layer = self._layer_of(f"{name}.")
            if held and layer and layer not in self._from_cache:
                self.cache.store(
                    layer, {self._source_name(key): value for key, value in held.items()}
                )

    def _layer_of(self, name: str) -> str | None:
        """The decoder layer, as the base model names it, that a parameter belongs to."""
        source = self._source_name(name)
        if not source.startswith(f"{self._layers}."):
            return None
        return ".".join(source.split(".")[: self._layers.count(".") + 2])

    def _fill_base(self, slots: list[Slot]) -> nn.Parameter | None:
        """Read each weight once, for all its slots; returns a trained head over an embedding."""
        by_source: dict[str, list[Slot]] = {}
        for slot in slots:
            by_source.setdefault(self._source_name(slot.name), []).append(slot)
        wanted = [(name, group[0].empty.shape) for name, group in by_source.items()]
        cuts = {name: cut for name, group in by_source.items() if (cut := self._slice_of(group))}
        tied_head = None
        read = self.source.read(wanted, cuts)
        for group, value in zip(by_source.values(), read, strict=True):
            for slot in group:
                if slot is not group[0] and self._is_head(slot) and not self._is_copy(slot):
                    tied_head = self._share(group[0], slot)
                elif (own := self.method.started(slot.name)) is not None:
                    self.place(slot, own)
                elif self.method.starts_at_zero(slot.name):
                    assert isinstance(value, Tensor)  # no such method holds weights as stored
                    self.place(slot, torch.zeros_like(value))
                else:
                    self.place(slot, value if slot is group[-1] else copy.deepcopy(value))
        return tied_head

    def _slice_of(self, slots: list[Slot]) -> Slice | None:
        """Return the slice that this rank needs of a weight; quantized ones are made whole."""
        cuts = [self._cuts.cuts.get(slot.name) for slot in slots]
        whole = [holds_quantized(slot) or id(slot.owner) in self._measured for slot in slots]
        if None in cuts or any(whole):
            return None
        slices = {cut.slice for cut in cuts if cut is not None}
        return slices.pop() if len(slices) == 1 else None

    def _fill_buffers(self, slots: list[BufferSlot]) -> None:
        """Read the buffers that the checkpoint holds."""
        wanted = [(self._source_name(slot.name), slot.value.shape) for slot in slots]
        for slot, value in zip(slots, self.source.read_buffers(wanted), strict=True):
            if value is not None:
                slot.fill(value.to(slot.value.device, self.types.of(self._source_name(slot.name))))

    def _share(self, embedding: Slot, head: Slot) -> nn.Parameter | None:
        """Let the head use the embedding's memory; trained, it keeps a gradient of its own."""
        if isinstance(embedding.owner, QuantizableModule) and embedding.owner.quantized("weight"):
            assert isinstance(head.owner, QuantizableModule)
            head.owner.share(embedding.owner)
            return None
        weight = embedding.owner._parameters[embedding.attribute]
        assert weight is not None
        if not weight.requires_grad:
            head.fill(weight)
            return None
        parameter = nn.Parameter(weight.data)
        head.fill(parameter)
        return parameter

    def _fill_adapters(self, stage: StageSpec) -> dict[str, Tensor]:
        """Initialize adapters, after the weights that they may start from."""
        kept: dict[str, Tensor] = {}
        for name, layer in self.method.adapters(stage.modules):
            values = self._taken.pop(name, None) or self.method.initial_values(name, layer)
            for part, value in values.items():
                path, _, attribute = part.rpartition(".")
                owner = layer.get_submodule(path)
                value = self._cuts.part(f"{name}.{part}", value)
                value = value.to(self.device, self.trained_dtype)
                owner._parameters[attribute] = nn.Parameter(value)
                if self.method.keeps(part):
                    kept[f"{name}.{part}"] = value.cpu().clone()
        return kept

    def _share_rows(self, stage: StageSpec) -> nn.Parameter | None:
        """Let a tied head have the embedding's trained rows, with a gradient of its own."""
        rows = [adapter.trainable_tokens_delta for _, adapter in row_adapters(stage.modules)]
        if not self.architecture.tied or len(rows) < 2:
            return None
        embedding, head = rows
        shared = nn.Parameter(embedding[ADAPTER].data)
        head[ADAPTER] = shared
        return shared

    @property
    def _layers(self) -> str:
        return self.architecture.family.layers

    def _source_name(self, name: str) -> str:
        """The name that the value of a parameter is asked for by."""
        name = self.method.stored_name(base_name(name))
        if self.architecture.tied and name == self.head_name:
            return self.embedding_name
        return name

    def _is_head(self, slot: Slot) -> bool:
        return base_name(slot.name) == self.head_name

    def _is_copy(self, slot: Slot) -> bool:
        """Return whether PEFT trains a copy of a whole module there, apart from everything else."""
        return ".modules_to_save." in slot.name

    def _trained(self, slot: Slot, parameter: nn.Parameter | None) -> TrainedParameter:
        assert parameter is not None
        name, owned = self._trained_name(slot)
        is_partial = slot.name in self._cuts.partial
        return TrainedParameter(name, parameter, owned, self._cuts.cuts.get(slot.name), is_partial)

    def _trained_name(self, slot: Slot) -> tuple[str, bool]:
        """Return the name under which a parameter is trained, and whether it is counted here."""
        family, prefix = self.architecture.family, self.method.prefix
        if self.architecture.tied and slot.name == rows_name(prefix, family.head):
            return rows_name(prefix, family.embedding), False
        tied = self.architecture.tied and self._is_head(slot) and not self._is_copy(slot)
        if tied and not is_adapter(slot.name):
            return self.embedding_name, False
        return slot.name, True
