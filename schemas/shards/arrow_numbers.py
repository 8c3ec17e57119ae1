"""Arrow columns as numpy arrays, without Arrow's `to_numpy`: that imports pandas, 25 MiB."""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def one_chunk(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as one array; copies nothing that is one already."""
    if isinstance(column, pa.Array):
        return column
    if column.num_chunks > 1:
        return column.combine_chunks()
    return column.chunk(0) if column.num_chunks else pa.nulls(0, column.type)


def numbers_of(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """A read-only view of numbers.

    Raises:
        ValueError: some are null.
    """
    array = without_nulls(one_chunk(column))
    kind = np.dtype(array.type.to_pandas_dtype())
    if not len(array):
        return np.empty(0, kind)
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * kind.itemsize)


def bools_of(array: pa.BooleanArray) -> NDArray[np.bool_]:
    """Unpacked bits.

    Raises:
        ValueError: some are null.
    """
    first, start = divmod(without_nulls(array).offset, 8)
    packed = np.frombuffer(array.buffers()[1], np.uint8)[first:]
    bits = np.unpackbits(packed, count=start + len(array), bitorder="little")
    return bits[start:].view(np.bool_)


def without_nulls(array: pa.Array) -> pa.Array:
    """The same array."""
    if array.null_count:
        raise ValueError(f"{array.null_count} of {len(array)} values are null")
    return array


def as_arrow(numbers: NDArray[Any]) -> pa.Array:
    """Numbers where they lie. `pa.array` imports pandas, to ask whether it is given some."""
    kind = pa.from_numpy_dtype(numbers.dtype)
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])


def leave_pandas_out() -> None:
    """Let Arrow do without pandas in this process, which then cannot `to_pandas`.

    `pa.array`, `to_pylist` and others import it, for 0.2 s and 25 MiB, to ask whether they are
    given some of it; pyarrow 26 tries that once.
    """
    if "pandas" in sys.modules:
        return
    finder = WithoutPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(finder)


class WithoutPandas(MetaPathFinder):
    """Finds pandas to be missing."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        """Leave all other modules to the finders behind."""
        if name == "pandas":
            raise ModuleNotFoundError("left out", name=name)
