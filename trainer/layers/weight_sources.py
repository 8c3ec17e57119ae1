"""Where the weights of a layer lie that come to the device only while it computes."""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from headrace.trainer import devices

# torch 2.13 has renamed it
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
