"""Messages between ranks: plain data, arrays and the project's records as bytes, never pickle.

A message is two lengths, JSON of the names of record classes, JSON of the structure, and the bytes
of arrays in order. Whatever is no plain value or list stands as an object of one key:
`{"t": [...]}` a tuple, `{"d": [[key, value], ...]}` a dictionary, `{"a": [dtype, shape]}` a tensor,
`{"n": ...}` a numpy array, and `{"0": [...]}` the fields of a record of the first class.
"""

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor

from headrace.trainer.parallel import RankLayout

T = TypeVar("T")

ALIGNMENT = 16  # of arrays in a message, which are read in place
LENGTH = 8  # bytes of a length
SCALARS = frozenset({type(None), bool, int, float, str})
PACKAGE = "headrace."


class Packer:
    """Takes values apart into structure, record classes and arrays."""

    def __init__(self) -> None:
        self.classes: dict[type, str] = {}
        self.arrays: list[Tensor] = []

    def plain(self, value: Any) -> Any:
        """Return a value as JSON can hold it.

        Raises:
            TypeError: it is of another kind than messages are of.
        """
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind is list:
            return [item if type(item) in SCALARS else self.plain(item) for item in value]
        if kind in self.classes:
            return {self.classes[kind]: self.plain(parts_of(value))}
        if kind is tuple:
            return {"t": self.plain(list(value))}
        if kind is dict:
            return {"d": [[self.plain(key), self.plain(item)] for key, item in value.items()]}
        if isinstance(value, Tensor):
            return {"a": self._array(value)}
        if isinstance(value, np.ndarray):
            return {"n": self._array(torch.from_numpy(np.ascontiguousarray(value)))}
        if isinstance(value, float):  # numpy's
            return float(value)
        check_record(kind)
        self.classes[kind] = str(len(self.classes))
        return self.plain(value)

    def _array(self, value: Tensor) -> list[Any]:
        self.arrays.append(value.detach().cpu().contiguous())
        return [str(value.dtype).removeprefix("torch."), list(value.shape)]


def check_record(kind: type) -> None:
    """Messages hold records of this project's own classes.

    Raises:
        TypeError: it is of none of them.
    """
    is_record = is_dataclass(kind) or hasattr(kind, "_fields") or issubclass(kind, BaseModel)
    if not (is_record and kind.__module__.startswith(PACKAGE)):
        raise TypeError(f"{kind} is not sent between ranks")


def parts_of(value: Any) -> list[Any]:
    """Return the fields of a record, in the order in which its class is built from them."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, BaseModel):
        return [[name, item] for name, item in value.model_dump(mode="json").items()]
    return [getattr(value, field.name) for field in fields(value)]


def pack(value: Any) -> Tensor:
    """Return a value as a message, [n] uint8."""
    packer = Packer()
    structure = as_json(packer.plain(value))
    names = as_json([f"{kind.__module__}:{kind.__qualname__}" for kind in packer.classes])
    lengths = b"".join(len(text).to_bytes(LENGTH, "little") for text in (names, structure))
    parts = [torch.frombuffer(bytearray(lengths + names + structure), dtype=torch.uint8)]
    parts += [array.reshape(-1).view(torch.uint8) for array in packer.arrays]
    return torch.cat([padded(part, -len(part) % ALIGNMENT) for part in parts])


def as_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def padded(part: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(part, (0, count))


class Unpacker:
    """Makes values of the objects of a message, which come in the order in which they end."""

    def __init__(self, classes: list[Any], message: Tensor, start: int) -> None:
        self.classes = classes
        self.message = message
        self.place = start

    def __call__(self, tagged: dict[str, Any]) -> Any:
        ((tag, content),) = tagged.items()
        match tag:
            case "t":
                return tuple(content)
            case "d":
                return dict(content)
            case "a":
                return self._array(*content)
            case "n":
                return self._array(*content).numpy()
        kind = self.classes[int(tag)]
        return kind.model_validate(dict(content)) if issubclass(kind, BaseModel) else kind(*content)

    def _array(self, name: str, shape: list[int]) -> Tensor:
        dtype: torch.dtype = getattr(torch, name)
        start = self.place + -self.place % ALIGNMENT
        self.place = start + dtype.itemsize * math.prod(shape)
        return self.message[start : self.place].view(dtype).reshape(shape)


def unpack(message: Tensor) -> Any:
    """Return the value of a message; its arrays lie in the message's memory."""
    head = message[: 2 * LENGTH].numpy().tobytes()
    names = 2 * LENGTH + int.from_bytes(head[:LENGTH], "little")
    end = names + int.from_bytes(head[LENGTH:], "little")
    classes = [
        class_named(name) for name in json.loads(message[2 * LENGTH : names].numpy().tobytes())
    ]
    made = Unpacker(classes, message, end)
    return json.loads(message[names:end].numpy().tobytes(), object_hook=made)


def class_named(name: str) -> Any:
    """Return a record class of this project's."""
    module, _, path = name.partition(":")
    assert module.startswith(PACKAGE), name
    kind = getattr(importlib.import_module(module), path)
    check_record(kind)
    return kind


# --- on their way ---


def send(value: Any, rank: int, group: Any) -> None:
    """Send a value to a rank, which calls `receive`."""
    message = pack(value)
    dist.send(torch.tensor([len(message)]), dst=rank, group=group)
    dist.send(message, dst=rank, group=group)


def receive(rank: int, group: Any) -> Any:
    """Return what a rank sends."""
    size = torch.empty(1, dtype=torch.int64)
    dist.recv(size, src=rank, group=group)
    message = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(message, src=rank, group=group)
    return unpack(message)


def broadcast(value: T | None, rank: int, group: Any) -> T:
    """Return one rank's value at every member of the group.

    Args:
        value: at that rank; ignored elsewhere.
    """
    message = pack(value)
    size = torch.tensor([len(message)])
    dist.broadcast(size, src=rank, group=group)
    if dist.get_rank() != rank:
        message = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(message, src=rank, group=group)
    received: T = unpack(message)
    return received


def gather(value: T, group: Any) -> list[T]:
    """Return each member's value, in rank order, at every member."""
    message, members = pack(value), dist.get_world_size(group)
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(members)]
    dist.all_gather(sizes, torch.tensor([len(message)]), group=group)
    longest = max(int(size) for size in sizes)
    messages = [torch.empty(longest, dtype=torch.uint8) for _ in range(members)]
    message = padded(message, longest - len(message))
    dist.all_gather(messages, message, group=group)
    return [unpack(message) for message in messages]


def gather_at_first(value: T, layout: RankLayout) -> list[T]:
    """Return each rank's value, in rank order, at the first rank; nothing at the others."""
    if layout.rank != 0:
        send(value, 0, layout.world_group)
        return []
    others = range(1, layout.dims.world)
    return [value, *(receive(rank, layout.world_group) for rank in others)]


def from_first_rank(compute: Callable[[], T], layout: RankLayout) -> T:
    """Return a value that the first rank works out for all."""
    return broadcast(compute() if layout.rank == 0 else None, 0, layout.world_group)
