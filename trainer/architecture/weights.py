"""Reads tensors from a Hugging Face model directory: only what is asked for, each byte once."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from headrace.schemas.errors import DataError
from headrace.trainer.architecture.model_files import StoredTensor
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

    def read_groups(self, groups: Sequence[Sequence[str]]) -> Iterator[list[Tensor]]:
        """Groups of tensors in order, in the types they are stored in, read ahead by several
        workers.

        Raises:
            DataError: a file that ends early, or a type that torch lacks.
        """
        waiting: list[tuple[list[Future[Tensor]], int]] = []
        ahead = 0
        rest = iter(groups)
        following = next(rest, None)
        while waiting or following is not None:
            while following is not None and (not waiting or ahead < AHEAD_BYTES):
                stored = [self.tensors[name] for name in following]
                jobs = [self._pool.submit(self._reader(tensor)) for tensor in stored]
                size = sum(tensor.nbytes for tensor in stored)
                waiting.append((jobs, size))
                ahead += size
                following = next(rest, None)
            jobs, size = waiting.pop(0)
            ahead -= size
            yield [job.result() for job in jobs]
            del jobs

    def _reader(self, stored: StoredTensor) -> Callable[[], Tensor]:
        if stored.dtype not in DTYPES:
            raise DataError(
                f"{stored.path}: tensors of type {stored.dtype}; use a checkpoint in BF16 or F32"
            )
        if stored.path not in self._descriptors:
            self._descriptors[stored.path] = os.open(stored.path, os.O_RDONLY)
        descriptor = self._descriptors[stored.path]

        def read() -> Tensor:
            tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
            if tensor.nbytes != stored.nbytes:
                raise DataError(f"{stored.path}: a tensor's size differs from its shape")
            if not stored.nbytes:
                return tensor
            memory = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            done = 0
            while done < stored.nbytes:
                part = memory[done : done + READ_BYTES]
                count = os.preadv(descriptor, [part], stored.offset + done)
                if not count:
                    raise DataError(f"{stored.path}: ends early; fetch the model again")
                done += count
            return tensor

        return read
