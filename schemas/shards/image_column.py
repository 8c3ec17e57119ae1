"""The column of pictures: its type, and the checks that hold for every row of it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from headrace.schemas.shards.arrow_numbers import numbers_of, one_chunk
from headrace.schemas.shards.shard_format import IMAGE_NUMBERS, IMAGES

SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")  # PNG, JPEG, WebP
MAX_SIDE = 1 << 24

Numbers = NDArray[np.integer[Any]]


def problems_of_images(rows: pa.Table, placeholder: int) -> Iterator[str]:
    """Yield pictures that are none, out of order, or fill other tokens than are there for them.

    A row without pictures is null, or an empty list. Stops at the first kind of problem, which
    later ones build on.

    Args:
        placeholder: the id of the tokens that pictures fill.
    """
    column = one_chunk(rows[IMAGES])
    tiles, owners = pc.list_flatten(column), pc.list_parent_indices(column)
    owner = numbers_of(owners)
    problem = tile_problem(tiles, owner)
    if problem is not None:
        yield problem
        return
    numbers = {name: numbers_of(tiles.field(name)) for name in IMAGE_NUMBERS}
    starts = np.diff(owner, prepend=-1) != 0  # first tiles of their rows
    problem = order_problem(numbers, owner, starts)
    if problem is not None:
        yield problem
        return
    first = starts | (np.diff(numbers["picture"], prepend=0) != 0)  # first tiles of pictures
    # float64 is exact up to 2^53, far above the tokens of any row
    filled = np.bincount(
        owner, weights=np.where(first, numbers["tokens"], 0), minlength=rows.num_rows
    )
    for name in ("input_ids", "rejected_input_ids"):
        if name in rows.column_names:
            yield from placeholder_problems(rows[name], name, filled, placeholder)


def tile_problem(tiles: pa.StructArray, owner: Numbers) -> str | None:
    """Return what is wrong with the values of the first tile that something is wrong with."""
    if not len(tiles):
        return None
    for name in ("bytes", *IMAGE_NUMBERS):
        values = tiles.field(name)
        if values.null_count:
            place = pc.index(values.is_null(), True).as_py()
            return f"column {IMAGES}, row {owner[place]}: a null among its values ({name})"
    for name in IMAGE_NUMBERS[1:]:
        values = numbers_of(tiles.field(name))
        wrong = (values < 1) | (values > MAX_SIDE)
        if wrong.any():
            place = int(np.argmax(wrong))
            return f"column {IMAGES}, row {owner[place]}: {name} = {values[place]}"
    known = [pc.starts_with(tiles.field("bytes"), pattern=mark) for mark in SIGNATURES]
    any_known = pc.or_(pc.or_(known[0], known[1]), known[2])
    if not pc.all(any_known).as_py():
        place = pc.index(any_known, False).as_py()
        return f"column {IMAGES}, row {owner[place]}: bytes that are no PNG, JPEG or WebP"
    return None


def order_problem(
    numbers: dict[str, Numbers], owner: Numbers, starts: NDArray[np.bool_]
) -> str | None:
    """Return the first row whose pictures are not numbered from 0, or differ in their tiles."""
    picture = numbers["picture"]
    steps = np.diff(picture, prepend=0)
    wrong = np.where(starts, picture != 0, (steps < 0) | (steps > 1))
    if wrong.any():
        place = int(np.argmax(wrong))
        return f"column {IMAGES}, row {owner[place]}: picture {picture[place]} is out of its order"
    inside = ~starts & (steps == 0)
    for name in IMAGE_NUMBERS[1:]:
        wrong = inside & (np.diff(numbers[name], prepend=0) != 0)
        if wrong.any():
            place = int(np.argmax(wrong))
            return (
                f"column {IMAGES}, row {owner[place]}: tiles of picture {picture[place]} "
                f"differ in {name}"
            )
    return None


def placeholder_problems(
    ids: pa.ChunkedArray, name: str, filled: NDArray[Any], placeholder: int
) -> Iterator[str]:
    """Yield the first row that has other placeholders than its pictures fill."""
    owners = numbers_of(pc.list_parent_indices(ids))
    marked = numbers_of(pc.list_flatten(ids)) == placeholder
    found = np.bincount(owners[marked], minlength=len(filled))
    if not np.array_equal(found, filled):
        row = int(np.argmax(found != filled))
        yield (
            f"column {name}, row {row}: {found[row]} placeholders, its pictures fill "
            f"{int(filled[row])}"
        )
