"""Offloading of the tensors that layers keep for the backward pass to host memory.

Copies run on a stream of their own, next to the computation. When the backward pass takes a tensor
back, the one that it will ask for next is fetched already.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from headrace.trainer import devices


@dataclass(eq=False)
class Offloaded:
    """A tensor in host memory."""

    host: Tensor  # pinned on a machine with a GPU
    device: torch.device
    copied: torch.Event | None  # the copy to the host; None on CPU
    before: "Offloaded | None"  # the one that was offloaded before, and is wanted back after it
    fetched: Tensor | None = None
    ready: torch.Event | None = None  # the copy back


class ActivationOffload:
    """Moves the inputs of checkpointed layers to the host and back.

    Args:
        device: of the activations. On CPU they are copied within host memory, which saves nothing
            and shows that the bits stay.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = devices.new_stream(device)
        self.last: Offloaded | None = None

    def begin(self) -> None:
        """Start a micro-batch: no tensor precedes its first one."""
        self.last = None

    @contextmanager
    def of(self, hidden: Tensor) -> Iterator[None]:
        """Offload `hidden` if autograd saves it in this context; all else stays where it is."""
        # the hooks live as long as the graph: they must not hold the tensor itself
        memory, shape = hidden.untyped_storage().data_ptr(), hidden.shape
        mine: list[Offloaded] = []

        def pack(tensor: Tensor) -> Tensor | Offloaded:
            if tensor.untyped_storage().data_ptr() != memory or tensor.shape != shape:
                return tensor
            if not mine:
                mine.append(self.send(tensor))
            return mine[0]

        def unpack(packed: Tensor | Offloaded) -> Tensor:
            return packed if isinstance(packed, Tensor) else self.take_back(packed)

        with saved_tensors_hooks(pack, unpack):
            yield

    def send(self, tensor: Tensor) -> Offloaded:
        """Begin to copy a tensor to the host."""
        kept = tensor.detach()
        if self.stream is None:
            sent = Offloaded(kept.clone(), tensor.device, None, self.last)
        else:
            host = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
            self.stream.wait_stream(devices.current_stream(tensor.device))
            with devices.on_stream(self.stream):
                host.copy_(kept, non_blocking=True)
            kept.record_stream(self.stream)
            sent = Offloaded(host, tensor.device, self.stream.record_event(), self.last)
        self.last = sent
        return sent

    def take_back(self, sent: Offloaded) -> Tensor:
        """Return a tensor on its device, and begin to fetch the one that was sent before it."""
        self._fetch(sent)
        tensor = sent.fetched
        assert tensor is not None
        if sent.ready is not None:
            current = devices.current_stream(sent.device)
            current.wait_event(sent.ready)
            tensor.record_stream(current)
        sent.fetched = None
        if sent.before is not None:
            self._fetch(sent.before)
            sent.before = None
        return tensor

    def _fetch(self, sent: Offloaded) -> None:
        if sent.fetched is not None:
            return
        if self.stream is None:
            sent.fetched = sent.host.clone()
            return
        assert sent.copied is not None
        with devices.on_stream(self.stream):
            self.stream.wait_event(sent.copied)
            sent.fetched = sent.host.to(sent.device, non_blocking=True)
        sent.ready = self.stream.record_event()
