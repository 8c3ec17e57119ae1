"""Reads tensors from a Hugging Face model directory: only what is asked for, each byte once."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from headrace.schemas.errors import DataError
from headrace.trainer.architecture.model_files import Slice, StoredTensor
from headrace.trainer.architecture.weight_index import stored_tensors

WORKERS = 4
AHEAD_BYTES = 256 << 20  # read ahead of the tensor in use
READ_BYTES = 64 << 20  # in one system call
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class WeightFiles:
    """Tensors by the names that they have in the files. Use as a context manager.

    Ranges are read into memory of their own, not mapped, so that a process holds what it asked for
    and no page of its neighbors' weights.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors = stored_tensors(directory)
        self._descriptors: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="weights")

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read_groups(
        self, groups: Sequence[Sequence[str]], cuts: Sequence[Slice | None] | None = None
    ) -> Iterator[list[Tensor]]:
        """Groups of tensors in order, in the types they are stored in, read ahead by several
        workers.

        Args:
            cuts: what to read of the tensors of each group; by default all.

        Raises:
            DataError: a file that ends early, or a type that torch lacks.
        """
        waiting: list[tuple[list[Future[Tensor]], int]] = []
        ahead = 0
        rest = iter(zip(groups, cuts or [None] * len(groups), strict=True))
        following = next(rest, None)
        while waiting or following is not None:
            while following is not None and (not waiting or ahead < AHEAD_BYTES):
                names, cut = following
                stored = [self.tensors[name] for name in names]
                jobs = [self._pool.submit(self._reader(tensor, cut)) for tensor in stored]
                size = sum(bytes_of(tensor, cut) for tensor in stored)
                waiting.append((jobs, size))
                ahead += size
                following = next(rest, None)
            jobs, size = waiting.pop(0)
            ahead -= size
            yield [job.result() for job in jobs]
            del jobs

    def _reader(self, stored: StoredTensor, cut: Slice | None) -> Callable[[], Tensor]:
        if stored.dtype not in DTYPES:
            raise DataError(
                f"{stored.path}: tensors of type {stored.dtype}; use a checkpoint in BF16 or F32"
            )
        if stored.path not in self._descriptors:
            self._descriptors[stored.path] = os.open(stored.path, os.O_RDONLY)
        descriptor = self._descriptors[stored.path]

        def read() -> Tensor:
            dtype = DTYPES[stored.dtype]
            if math.prod(stored.shape) * dtype.itemsize != stored.nbytes:
                raise DataError(f"{stored.path}: a tensor's size differs from its shape")
            shape = stored.shape if cut is None else cut.shape(stored.shape)
            tensor = torch.empty(shape, dtype=dtype)
            if not tensor.nbytes:
                return tensor
            memory = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            for start, size, offset in pieces(stored, cut):
                fill(memory[start : start + size], descriptor, offset, stored.path)
            return tensor

        return read


def bytes_of(stored: StoredTensor, cut: Slice | None) -> int:
    """Return the bytes that are read of a tensor."""
    if cut is None or not stored.nbytes:
        return stored.nbytes
    return stored.nbytes // math.prod(stored.shape) * math.prod(cut.shape(stored.shape))


def pieces(stored: StoredTensor, cut: Slice | None) -> Iterator[tuple[int, int, int]]:
    """Yield what lies together in a file: its place in the memory read to, its bytes, its offset.

    Whole rows lie together; of columns, those of each row do.
    """
    if cut is None:
        yield 0, stored.nbytes, stored.offset
        return
    times = math.prod(stored.shape[: cut.dim])
    whole = stored.nbytes // times  # bytes of the cut dimension and those below
    one = whole // stored.shape[cut.dim]
    size = (cut.stop - cut.start) * one
    for number in range(times):
        yield number * size, size, stored.offset + number * whole + cut.start * one


def fill(memory: memoryview, descriptor: int, offset: int, path: Path) -> None:
    """Read bytes from a place in a file.

    Raises:
        DataError: it ends before.
    """
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done : done + READ_BYTES]], offset + done)
        if not count:
            raise DataError(f"{path}: ends early; fetch the model again")
        done += count
