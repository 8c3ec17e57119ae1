"""Columns become numpy arrays in place, and reading shards imports no pandas."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from headrace.schemas.shards.arrow_numbers import as_arrow, bools_of, numbers_of

READ_ALL = """
import sys
from pathlib import Path
from headrace.schemas.train.data_config import LoaderConfig
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.trainer.shards.decoded_rows import DecodedRows
from headrace.trainer.shards.row_group_source import RowGroupSource
from headrace.trainer.order.row_order import RowGroup

shards = Path(sys.argv[1])
manifest = read_manifest(shards)
source = RowGroupSource([str(shards)], [manifest], "train", LoaderConfig())
rows = manifest.split("train")[0].row_groups[0].rows
decoded = DecodedRows(source.read(RowGroup(0, 0, 0, rows)))
assert [len(decoded.row(index).input_ids) for index in range(rows)] == decoded.lengths
assert "pandas" not in sys.modules
"""


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int32(), pa.uint64()])
def test_numbers_go_to_numpy_and_back(kind):
    array = pa.array([5, 6, 7, 8], kind).slice(1)
    assert numbers_of(array).tolist() == [6, 7, 8]
    assert as_arrow(numbers_of(array)).equals(array)
    assert numbers_of(pa.chunked_array([array, array])).tolist() == [6, 7, 8, 6, 7, 8]
    assert numbers_of(pa.chunked_array([], kind)).tolist() == []


def test_numbers_are_not_copied():
    numbers = np.arange(5, dtype=np.uint16)
    again = numbers_of(as_arrow(numbers))
    numbers[2] = 77
    assert again[2] == 77


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 20])
def test_bits_are_unpacked_from_any_place(start):
    bits = np.random.default_rng(start).random(29) < 0.5
    part = pa.array(bits.tolist()).slice(start, 9)
    assert bools_of(part).dtype == np.bool_
    assert bools_of(part).tolist() == bits[start : start + 9].tolist()


def test_nulls_are_refused():
    with pytest.raises(ValueError, match="1 of 2 values are null"):
        numbers_of(pa.array([1, None], pa.int32()))
    with pytest.raises(ValueError, match="1 of 2 values are null"):
        bools_of(pa.array([True, None]))


def test_reading_and_checking_a_row_group_imports_no_pandas(tiny_shards):
    subprocess.run([sys.executable, "-c", READ_ALL, str(tiny_shards)], check=True)
