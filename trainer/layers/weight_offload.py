"""Frozen weights of decoder layers that lie elsewhere and are brought to the device layer by layer:
from host memory, or from the ranks that share them out.

The device has two places, each as large as the largest layer's weights. The weights of every second
layer share one: the modules' tensors are views of it for good, and what they hold changes. When a
layer is asked for, in the forward pass, in a recomputation or in the backward pass, its weights are
copied unless they are there, and the copy of the next one in the same direction starts on a stream
of its own, next to the computation.

What autograd keeps of such a weight is the view, which takes no memory; before the backward pass
gets it back, it asks for its layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from headrace.trainer import devices
from headrace.trainer.adapters.names import base_name, is_adapter
from headrace.trainer.quantized.frozen_weight import FrozenWeight

Offloaded = Literal["mlp", "experts", "layers"]
OFFLOADED: tuple[Offloaded, ...] = get_args(Offloaded)
WHOLE_LAYERS = "layers"
PLACES = 2
ALIGNMENT = 256  # bytes; what CUDA's allocator gives
# torch 2.13 has renamed it
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def is_offloaded(name: str, wish: str) -> bool:
    """Return whether a frozen weight of a decoder layer, by its whole name, is moved."""
    is_wanted = wish == WHOLE_LAYERS or wish in base_name(name).split(".")
    return is_wanted and not is_adapter(name)


@dataclass(frozen=True)
class Weight:
    """One tensor of a layer: where it belongs, and where it lies in its layer's memory."""

    owner: dict[str, Tensor | None]  # `_parameters` or `_buffers` of a module
    attribute: str
    start: int
    value: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.value.nbytes

    def show(self, memory: Tensor) -> None:
        """Make the module's tensor a view of some memory."""
        view = memory[self.start : self.stop].view(self.value.dtype).view(self.value.shape)
        is_parameter = isinstance(self.value, nn.Parameter)
        self.owner[self.attribute] = (
            nn.Parameter(view, requires_grad=False) if is_parameter else view
        )


class WeightSource(Protocol):
    """Holds the bytes of layers' weights."""

    def room(self, size: int) -> int:
        """Return the bytes of the device that a layer of such a size is copied to."""

    def take(self, index: int, weights: Tensor) -> None:
        """Hold a layer's weights, given as bytes in host memory."""

    def fetch(self, index: int, memory: Tensor) -> None:
        """Queue a copy of a layer's weights to memory of the device."""


class HostMemory:
    """Weights in host memory, where a GPU can read them.

    Attributes:
        held: bytes of each layer, by its number.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: dict[int, Tensor] = {}

    def room(self, size: int) -> int:
        """Return the size itself."""
        return size

    def take(self, index: int, weights: Tensor) -> None:
        """Copy them to memory that is registered with the device."""
        self.held[index] = devices.registered_memory(len(weights), self.device)
        self.held[index].copy_(weights)

    def fetch(self, index: int, memory: Tensor) -> None:
        """Copy them from the host."""
        host = self.held[index]
        memory[: len(host)].copy_(host, non_blocking=True)


class SharedMemory:
    """Weights shared out among the ranks that hold the same ones: each has a part of every layer.

    All of them must ask for the same layers in the same order, as they do: they run the same
    schedule over micro-batches of their own. Source: fully sharded data parallelism,
    https://arxiv.org/abs/2304.11277, of frozen weights, which have no gradients to reduce.

    Args:
        group: of these ranks, over the device's backend.

    Attributes:
        held: bytes of this rank's part of each layer, by its number.
    """

    def __init__(self, device: torch.device, group: Any) -> None:
        self.device, self.group = device, group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.held: dict[int, Tensor] = {}

    def room(self, size: int) -> int:
        """Return the size of as many equal parts as there are ranks."""
        return -(-size // self.ranks) * self.ranks

    def take(self, index: int, weights: Tensor) -> None:
        """Copy this rank's part to the device; the last one is filled up."""
        size = self.room(len(weights)) // self.ranks
        part = torch.zeros(size, dtype=torch.uint8, device=self.device)
        mine = weights[self.rank * size : (self.rank + 1) * size]
        part[: len(mine)].copy_(mine)
        self.held[index] = part

    def fetch(self, index: int, memory: Tensor) -> None:
        """Gather all parts."""
        part = self.held[index]
        all_gather(memory[: len(part) * self.ranks], part, group=self.group)


class WeightOffload:
    """The offloaded weights of one stage.

    Args:
        layers: the decoder layers by name in the whole model, their weights in host memory.
        wish: which of them.
        source: holds them from now on.
        device: of the computation. On CPU the copies are made at once, within host memory, which
            saves nothing and shows that the bits stay.

    Attributes:
        places: the device's memory.
        held: number of the layer whose weights are in each place.
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, nn.Module]],
        wish: Offloaded,
        device: torch.device,
        source: WeightSource,
    ) -> None:
        self.source = source
        self.stream = devices.new_stream(device)
        found = [find_weights(name, layer, wish) for name, layer in layers]
        sizes = [weights[-1].stop if weights else 0 for weights in found]
        self.order = [index for index, size in enumerate(sizes) if size]
        self.places = [
            torch.empty(source.room(max(sizes)), dtype=torch.uint8, device=device)
            for _ in range(PLACES)
        ]
        self.held: list[int | None] = [None] * PLACES
        self.ready: list[torch.Event | None] = [None] * PLACES
        for position, index in enumerate(self.order):
            self.source.take(index, self._packed(found[index], sizes[index], position % PLACES))
            found[index] = []
        self.positions = {index: position for position, index in enumerate(self.order)}
        self.direction, self.last = 1, 0

    def _packed(self, weights: list[Weight], size: int, place: int) -> Tensor:
        """Lay a layer's weights side by side, and show the modules their place."""
        packed = torch.empty(size, dtype=torch.uint8)
        for weight in weights:
            flat = weight.value.detach().contiguous().view(-1).view(torch.uint8)
            packed[weight.start : weight.stop].copy_(flat)
            weight.show(self.places[place])
        return packed

    def bring(self, index: int) -> None:
        """Have a layer's weights on the device for what is queued from now on."""
        position = self.positions.get(index)
        if position is None:
            return
        if position != self.last:
            ahead = position == self.last + 1 or position == 0
            self.direction = 1 if ahead else -1
        self.last = position
        place = self._fetch(position)
        event = self.ready[place]
        if event is not None:
            devices.current_stream(self.places[place].device).wait_event(event)
        following = position + self.direction
        if 0 <= following < len(self.order):
            self._fetch(following)

    def _fetch(self, position: int) -> int:
        """Start copying a layer's weights, unless they are there; returns their place."""
        index, place = self.order[position], position % PLACES
        if self.held[place] == index:
            return place
        self.held[place] = index
        memory = self.places[place]
        if self.stream is None:
            self.source.fetch(index, memory)
            return place
        # what was queued so far may still compute with the layer that was there
        self.stream.wait_stream(devices.current_stream(memory.device))
        with devices.on_stream(self.stream):
            self.source.fetch(index, memory)
            self.ready[place] = self.stream.record_event()
        return place

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Whatever autograd keeps of a layer's weights in this context is brought when wanted."""
        if index not in self.positions:
            yield
            return
        memory = self.places[self.positions[index] % PLACES].untyped_storage().data_ptr()

        def pack(tensor: Tensor) -> Tensor | tuple[Tensor]:
            if tensor.untyped_storage().data_ptr() != memory:
                return tensor
            return (tensor.detach(),)

        def unpack(packed: Tensor | tuple[Tensor]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            self.bring(index)
            return packed[0]

        with saved_tensors_hooks(pack, unpack):
            yield


def find_weights(prefix: str, layer: nn.Module, wish: Offloaded) -> list[Weight]:
    """The weights of one layer that are offloaded, laid out one after the other."""
    found: list[Weight] = []
    for path, module in layer.named_modules():
        if not is_offloaded(f"{prefix}.{path}.", wish):
            continue
        owners = [module._parameters]
        if isinstance(module, FrozenWeight):
            owners.append(module._buffers)
        for owner in owners:
            for attribute, value in owner.items():
                if value is not None and not value.requires_grad and value.numel():
                    start = found[-1].stop if found else 0
                    start = -(-start // ALIGNMENT) * ALIGNMENT
                    found.append(Weight(owner, attribute, start, value))
    return found
