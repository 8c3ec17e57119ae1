"""An optimizer whose states lie in host memory, and come to the device a few weights at a time.

There are as many optimizers as buckets of weights, each of which is the one that all weights would
have. While one steps, the states of the next are copied to the device, and those of the one before
back, on streams of their own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from headrace.schemas.train.optimizers import OFFLOAD_BUCKET
from headrace.trainer import devices
from headrace.trainer.optim import states
from headrace.trainer.optim.optimizer import OptimizerAround
from headrace.trainer.optim.parameter_groups import Stepped

Build = Callable[[Sequence[Stepped]], torch.optim.Optimizer]


class Bucket:
    """The optimizer of some weights, and where their states are.

    Args:
        stream: of the copies; None on CPU, where states are copied within host memory, which saves
            nothing and shows that the bits stay.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        stream: Any,
    ) -> None:
        self.optimizer = optimizer
        self.device = device
        self.stream = stream
        self.hosts: dict[tuple[Tensor, str], Tensor] = {}
        self.done: Any = None  # the last copy

    def fetch(self) -> None:
        """Begin to copy the states to the device."""
        with self._copying():
            for parameter, name, host in self._held(list(self.optimizer.state)):
                self.hosts[parameter, name] = host
                on_device = host.to(self.device, non_blocking=True, copy=True)
                self.optimizer.state[parameter][name] = on_device

    def wait(self) -> None:
        """Let the computation wait for the states."""
        if self.done is not None:
            devices.current_stream(self.device).wait_event(self.done)

    def put_back(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Begin to copy states to host memory, once the computation is done with them.

        Args:
            parameters: whose; by default those of all.
        """
        with self._copying():
            for parameter, name, value in self._held(parameters or list(self.optimizer.state)):
                host = self.hosts.pop((parameter, name), None)
                if host is None:
                    host = torch.empty(
                        value.shape, dtype=value.dtype, pin_memory=self.stream is not None
                    )
                host.copy_(value, non_blocking=True)
                if self.stream is not None:
                    value.record_stream(self.stream)
                self.optimizer.state[parameter][name] = host

    def finish(self) -> None:
        """Wait until host memory holds the states."""
        if self.done is not None:
            self.done.synchronize()

    def _held(self, parameters: Sequence[Tensor]) -> list[tuple[Tensor, str, Tensor]]:
        """Return the states of weights that are tensors; counts stay where they are."""
        return [
            (parameter, name, value)
            for parameter in parameters
            for name, value in self.optimizer.state[parameter].items()
            if isinstance(value, Tensor) and value.ndim
        ]

    @contextmanager
    def _copying(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(devices.current_stream(self.device))
        with devices.on_stream(self.stream):
            yield
        self.done = self.stream.record_event()


class OffloadedOptimizer(OptimizerAround):
    """Steps one bucket of weights after the other.

    Args:
        build: makes the optimizer of some weights.
    """

    def __init__(self, stepped: Sequence[Stepped], build: Build, device: torch.device) -> None:
        streams = [devices.new_stream(device) for _ in range(2)]
        parts = list(cut(stepped)) or [[]]
        self.buckets = [
            Bucket(build(part), device, streams[number % 2]) for number, part in enumerate(parts)
        ]
        self.inner = self.buckets[0].optimizer
        self.places = {
            stepped.parameter: bucket
            for bucket, part in zip(self.buckets, parts, strict=True)
            for stepped in part
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Return the groups of all buckets."""
        return list(chain.from_iterable(b.optimizer.param_groups for b in self.buckets))

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """Return the states by weight, in host memory."""
        self._finish()
        return {p: value for b in self.buckets for p, value in b.optimizer.state.items()}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for optimizer in self._on_device():
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the weights."""
        for bucket in self.buckets:
            bucket.optimizer.zero_grad(set_to_none)

    def eval(self) -> None:
        """Go to the weights that are used, where other ones are trained."""
        for optimizer in self._on_device():
            optimizer.eval()  # type: ignore[attr-defined]

    def train(self) -> None:
        """Go back to the weights that are trained."""
        for optimizer in self._on_device():
            optimizer.train()  # type: ignore[attr-defined]

    def tensors_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the states of a weight."""
        self._finish()
        return states.tensors_of(self.places[parameter].optimizer, parameter)

    def restore(self, parameter: nn.Parameter, read: states.Read) -> None:
        """Give a weight the states that `read` finds, in host memory."""
        bucket = self.places[parameter]
        states.restore(bucket.optimizer, parameter, read)
        bucket.put_back([parameter])

    def _on_device(self) -> Iterator[torch.optim.Optimizer]:
        """Yield each bucket's optimizer with its states on the device."""
        self.buckets[0].fetch()
        for number, bucket in enumerate(self.buckets):
            bucket.wait()
            if number + 1 < len(self.buckets):
                self.buckets[number + 1].fetch()
            yield bucket.optimizer
            bucket.put_back()

    def _finish(self) -> None:
        for bucket in self.buckets:
            bucket.finish()


def cut(stepped: Sequence[Stepped]) -> Iterator[list[Stepped]]:
    """Yield weights in buckets."""
    bucket: list[Stepped] = []
    for one in stepped:
        if bucket and sum(part.parameter.numel() for part in bucket) >= OFFLOAD_BUCKET:
            yield bucket
            bucket = []
        bucket.append(one)
    if bucket:
        yield bucket
