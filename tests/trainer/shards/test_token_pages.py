"""Ids read from pages without pyarrow's lists are the ids that pyarrow reads."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.schemas.shards.parquet_options import parquet_options
from headrace.schemas.shards.shard_format import COLUMNS
from headrace.trainer.shards.token_pages import read_struct, read_tokens

FIELD = COLUMNS.field("input_ids")


def write(rows, **options):
    """A file of one row group with only the ids, and its metadata."""
    table = pa.Table.from_arrays([pa.array(rows, FIELD.type)], schema=pa.schema([FIELD]))
    settings = parquet_options() | {"use_dictionary": False, "write_statistics": False} | options
    file = io.BytesIO()
    pq.write_table(table, file, **{k: v for k, v in settings.items() if v is not None})
    return memoryview(file.getvalue()), pq.read_metadata(file).row_group(0)


def random_rows(largest, rows=40):
    choose = np.random.default_rng(largest)
    return [choose.integers(0, largest + 1, choose.integers(1, 5000)) for _ in range(rows)]


@pytest.mark.parametrize("largest", [0, 255, 49_151, 128_255, 1 << 30])
@pytest.mark.parametrize("page", [1 << 12, 4 << 20])
def test_ids_of_any_size_in_any_number_of_pages_are_those_that_were_written(largest, page):
    rows = random_rows(largest)
    content, row_group = write(rows, data_page_size=page)
    ids, starts = read_tokens(row_group, content, 0)
    assert starts == [0, *np.cumsum([len(row) for row in rows])[:-1]]
    assert ids.dtype == (np.uint16 if largest < 1 << 16 else np.int32), "two bytes where they do"
    assert np.array_equal(ids, np.concatenate(rows))
    start = row_group.column(0).data_page_offset
    assert np.array_equal(read_tokens(row_group, content[start:], start).ids, ids)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([[1, 2], [None, 3]], {}),
        ([[1, 2], [], [3]], {}),
        ([[1, 2]], {"data_page_version": "2.0"}),
        ([[1, 2]], {"compression": "snappy", "compression_level": None}),
        ([[1, 2]], {"column_encoding": None}),
        ([[1, 2]], {"column_encoding": None, "use_dictionary": True}),
    ],
    ids=["a null", "an empty list", "pages of version 2", "snappy", "plain", "a dictionary"],
)
def test_pages_of_another_kind_are_left_to_pyarrow(rows, options):
    content, row_group = write(rows, **options)
    assert read_tokens(row_group, content, 0) is None


@pytest.mark.parametrize("longest", [1, 2, 7, 9, 40, 300])
def test_rows_of_any_length_start_where_pyarrow_has_them(longest):
    lengths = np.random.default_rng(longest).integers(1, longest + 1, 500)
    content, row_group = write([[1] * length for length in lengths], data_page_size=1 << 10)
    assert read_tokens(row_group, content, 0).starts == [0, *np.cumsum(lengths)[:-1]]


def test_headers_with_statistics_are_read_over():
    content, row_group = write(random_rows(99), write_statistics=True)
    header, _ = read_struct(content, row_group.column(0).data_page_offset)
    assert set(header[5][5]), "it must have statistics"
    assert read_tokens(row_group, content, 0) is not None


def test_a_header_that_is_none_is_refused():
    with pytest.raises(ValueError, match="a field of type 11"):
        read_struct(memoryview(b"\x1b\x00"), 0)
