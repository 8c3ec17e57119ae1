"""The column of pictures: what a reader accepts of it, and what it refuses by row."""

import copy
import re
from collections import Counter

import pyarrow.parquet as pq
import pytest
from pictures import images_record, random_rows, write_picture_shards
from pydantic import ValidationError

from headrace.dataprep.shards.verify import check_content
from headrace.schemas.shards.manifest import ImagesRecord
from headrace.schemas.shards.shard_format import IMAGE_BYTES, shard_schema
from headrace.schemas.shards.shard_rows import open_shard

RECORD = images_record("qwen2_vl", {"patch_size": 14, "merge_size": 2}, placeholder=5)
ROWS = random_rows(12)


def problems(folder, rows):
    manifest = write_picture_shards(folder, rows, RECORD, rows_in_group=20)
    (shard,) = manifest.shards
    with open_shard(folder / shard.file, manifest, shard) as file:
        return list(check_content(file, shard, manifest, Counter()))


def changed(change):
    """The rows, with a change to the first one that has two pictures, and its number."""
    rows = copy.deepcopy(ROWS)
    place = next(i for i, row in enumerate(rows) if len(row["images"] or []) > 1)
    change(rows[place])
    return rows, place


def set_all(name, value):
    def change(row):
        for entry in row["images"]:
            entry[name] = value

    return change


def set_first(name, value):
    return lambda row: row["images"][0].update({name: value})


DAMAGES = {
    "no picture's bytes": (set_first("bytes", b"GIF89a"), "bytes that are no PNG, JPEG or WebP"),
    "empty bytes": (set_first("bytes", b""), "bytes that are no PNG, JPEG or WebP"),
    "null bytes": (set_first("bytes", None), r"a null among its values \(bytes\)"),
    "a null number": (set_first("width", None), r"a null among its values \(width\)"),
    "no width": (set_all("width", 0), "width = 0"),
    "no tokens": (set_all("tokens", 0), "tokens = 0"),
    "not from 0": (set_first("picture", 1), "picture 1 is out of its order"),
    "a gap": (lambda row: row["images"][1].update(picture=2), "picture 2 is out of its order"),
    "tiles that differ": (
        lambda row: row["images"][-1].update(row["images"][-2] | {"tokens": 9}),
        r"tiles of picture \d differ in tokens",
    ),
    "too few placeholders": (
        lambda row: row["input_ids"].__setitem__(row["input_ids"].index(5), 7),
        r"\d+ placeholders, its pictures fill \d+",
    ),
    "a picture lost": (lambda row: row["images"].pop(), "placeholders, its pictures fill"),
    "all lost": (lambda row: row.update(images=None), "placeholders, its pictures fill 0"),
}


def test_rows_with_pictures_are_read_as_they_were_written(tmp_path):
    assert problems(tmp_path, ROWS) == []
    table = pq.read_table(tmp_path / "shard-00000.parquet")
    assert table["images"].to_pylist() == [row["images"] for row in ROWS]
    assert table.schema.equals(shard_schema(images=True).with_metadata(table.schema.metadata))


def test_pictures_of_pairs_fill_the_placeholders_of_both_sides(tmp_path):
    rows = [
        {**row, "document_lengths": [len(row["input_ids"])], "rejected_input_ids": row["input_ids"]}
        for row in ROWS
    ]
    assert problems(tmp_path / "whole", rows) == []
    rows[3] = rows[3] | {"rejected_input_ids": [7, *rows[3]["input_ids"][:-2], 5, 5]}
    (problem,) = problems(tmp_path / "broken", rows)
    assert "column rejected_input_ids, row 3: " in problem


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_its_row(tmp_path, damage):
    change, message = DAMAGES[damage]
    rows, place = changed(change)
    (problem,) = problems(tmp_path, rows)
    assert problem.startswith("row group 0: column ")
    assert f", row {place}: " in problem
    assert re.search(message, problem)


def test_a_manifest_with_pictures_asks_for_their_column(tmp_path):
    manifest = write_picture_shards(tmp_path, ROWS, RECORD)
    names = shard_schema().names
    path = tmp_path / "bare.parquet"
    pq.write_table(pq.read_table(tmp_path / "shard-00000.parquet", columns=names), path)
    shard = manifest.shards[0].model_copy(update={"bytes": path.stat().st_size})
    with pytest.raises(ValueError, match="column images is missing"):
        open_shard(path, manifest, shard)


def test_pictures_are_not_packed_twice(tmp_path):
    write_picture_shards(tmp_path, ROWS, RECORD)
    group = pq.ParquetFile(tmp_path / "shard-00000.parquet").metadata.row_group(0)
    packing = {
        group.column(index).path_in_schema: group.column(index).compression
        for index in range(group.num_columns)
    }
    assert packing.pop(IMAGE_BYTES) == "UNCOMPRESSED"
    assert set(packing.values()) == {"ZSTD"}


def test_settings_must_be_those_of_the_fingerprint():
    values = RECORD.model_dump() | {"settings": {"patch_size": 16}}
    with pytest.raises(ValidationError, match="fingerprint is not that"):
        ImagesRecord.model_validate(values)


def test_a_manifest_without_pictures_keeps_its_identity(tmp_path):
    manifest = write_picture_shards(tmp_path, ROWS, RECORD)
    assert "images" in manifest.identity()
    assert "images" not in manifest.model_copy(update={"images": None}).identity()
