"""The column of pictures: made of samples, counted, measured."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.dataprep.images.picture import Picture
from headrace.dataprep.text.sample import Sample
from headrace.schemas.shards.arrow_numbers import numbers_of, one_chunk
from headrace.schemas.shards.shard_format import IMAGES, IMAGES_FIELD

BYTES_A_TOKEN = 32  # of pictures: by which files between tasks and shards are measured

Counts = npt.NDArray[np.int64]
Rows: TypeAlias = pa.Table | pa.RecordBatch


def images_array(samples: Sequence[Sample], ends: Sequence[int]) -> pa.ListArray:
    """Return the tiles of each row's pictures; null where it has none.

    Args:
        samples: in the order of their tokens in the rows.
        ends: of rows, in samples.
    """
    starts = [0, *ends[:-1]]
    rows = [
        list(row_tiles([p for sample in samples[start:end] for p in sample.pictures])) or None
        for start, end in zip(starts, ends, strict=True)
    ]
    return pa.array(rows, IMAGES_FIELD.type)


def row_tiles(pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    """Return the entries of a row's pictures, numbered from 0."""
    return [
        {"bytes": tile, "picture": number, "tokens": picture.tokens}
        | {"width": picture.width, "height": picture.height}
        for number, picture in enumerate(pictures)
        for tile in picture.tiles
    ]


def has_pictures(rows: Rows) -> bool:
    """Return whether a table has the column of pictures."""
    return IMAGES in rows.schema.names


def row_pictures(rows: Rows) -> Counts:
    """Return the pictures of each row."""
    owners, tiles = owned_tiles(rows)
    numbers = numbers_of(tiles.field("picture"))
    counts = np.zeros(rows.num_rows, np.int64)
    np.maximum.at(counts, owners, numbers + 1)
    return counts


def row_picture_bytes(rows: Rows) -> Counts:
    """Return the bytes of each row's tiles."""
    owners, tiles = owned_tiles(rows)
    sizes = numbers_of(pc.binary_length(tiles.field("bytes")))
    total = np.bincount(owners, weights=sizes, minlength=rows.num_rows)
    counted: Counts = total.astype(np.int64)
    return counted


def owned_tiles(rows: Rows) -> tuple[npt.NDArray[Any], pa.StructArray]:
    """Return the row of each tile, and the tiles."""
    column = one_chunk(rows.column(IMAGES))
    tiles = pc.list_flatten(column)
    return numbers_of(pc.list_parent_indices(column)), tiles


def weight(tokens: int, picture_bytes: int) -> int:
    """Return what rows take in memory and files, in tokens."""
    return tokens + picture_bytes // BYTES_A_TOKEN
