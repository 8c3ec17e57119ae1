"""Parquet of Spark, jllm and Hugging Face becomes a shard directory by a manifest alone."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from headrace.dataprep.shards.blend_inputs import Blend
from headrace.dataprep.shards.foreign_index import find_files, index, parse_columns
from headrace.dataprep.shards.repartition import read_inputs
from headrace.dataprep.shards.verify import verify
from headrace.jobs.console.inspection import inspect
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.shards.foreign_columns import ForeignColumns
from headrace.schemas.shards.manifest_file import read_manifest, write_manifest
from headrace.schemas.shards.shard_rows import read_row_group

VOCABULARY = 40


@pytest.fixture
def model(tmp_path):
    """A folder with a tokenizer of 40 words."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    folder = tmp_path / "model"
    folder.mkdir()
    content = json.dumps({**EMPTY_TOKENIZER, **tokenizer})
    Tokenizer.from_str(content).save(str(folder / "tokenizer.json"))
    return folder


EMPTY_TOKENIZER = dict.fromkeys(
    ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
) | {"added_tokens": []}


def write(folder, name="part-0.parquet", row_group_size=None, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name, row_group_size=row_group_size)
    return folder


def rows_of(folder):
    """All rows as the trainer would get them: ids, trained, documents, source."""
    manifest = read_manifest(folder)
    found = []
    for shard in manifest.shards:
        with pq.ParquetFile(folder / shard.file) as file:
            for group in range(file.num_row_groups):
                found += read_row_group(file, group, manifest, shard).to_pylist()
    return [
        (row["input_ids"], row["loss_mask"], row["document_lengths"], row["source"])
        for row in found
    ]


def test_hugging_faces_columns_lose_their_padding_and_ignored_labels(tmp_path, model):
    folder = write(
        tmp_path / "hf",
        input_ids=[[5, 6, 7, 0, 0], [0, 8, 9], [3]],
        attention_mask=[[1, 1, 1, 0, 0], [0, 1, 1], [1]],
        labels=[[-100, 6, 7, -100, -100], [-100, -100, 9], [-100]],
    )
    manifest = index(folder, model, source="chat")
    assert rows_of(folder) == [
        ([5, 6, 7], [False, True, True], [3], "chat"),
        ([8, 9], [False, True], [2], "chat"),
        ([3], [False], [1], "chat"),
    ]
    assert manifest.sequence_len == 3
    assert manifest.ledger.tokens_dropped == {"padding": 3}
    (shard,) = manifest.shards
    assert (shard.rows, shard.tokens, shard.trained_tokens) == (3, 6, 3)
    (source,) = manifest.sources
    assert (source.documents, source.tokens, source.trained_tokens) == (3, 6, 3)
    assert verify(folder) == []


def test_jllms_starts_of_documents_may_end_one_before_the_row(tmp_path, model):
    folder = write(
        tmp_path / "jllm",
        input_ids=[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4], [7, 8]],
        cu_seqlens=[[0, 2, 5], [0, 3, 4], [0, 1]],
    )
    index(folder, model)
    assert [row[2] for row in rows_of(folder)] == [[2, 4], [3, 1], [2]]
    assert [row[1] for row in rows_of(folder)] == [None, None, None]
    assert verify(folder) == []


def test_positions_that_begin_anew_begin_a_document(tmp_path, model):
    folder = write(
        tmp_path / "packed",
        input_ids=[[1, 2, 3, 4, 0], [5, 6]],
        position_ids=[[0, 1, 0, 1, 0], [3, 4]],
        attention_mask=[[1, 1, 1, 1, 0], [1, 1]],
    )
    index(folder, model)
    assert [(ids, lengths) for ids, _, lengths, _ in rows_of(folder)] == [
        ([1, 2, 3, 4], [2, 2]),
        ([5, 6], [2]),
    ]


def test_an_id_at_the_end_of_rows_can_be_declared_padding(tmp_path, model):
    folder = write(tmp_path / "padded", input_ids=[[1, 9, 2, 9, 9], [3, 9], [4]])
    columns = parse_columns([], 9, find_files(folder)[0])
    manifest = index(folder, model, columns)
    assert [row[0] for row in rows_of(folder)] == [[1, 9, 2], [3], [4]]
    assert manifest.ledger.tokens_dropped == {"padding": 3}


def test_other_names_sources_and_splits_can_be_told(tmp_path, model):
    columns = {"ids": [[1, 2], [3]], "target": [[1, -100], [3]], "from": ["a", "b"]}
    folder = write(tmp_path / "named", "train-0.parquet", **columns)
    write(folder / "deep", "test-0.parquet", **columns)
    (folder / "_temporary").mkdir()
    (folder / "_temporary" / "x.parquet").write_text("not Parquet")
    given = ["input_ids=ids", "labels=target", "source=from"]
    columns = parse_columns(given, None, find_files(folder)[0])
    manifest = index(folder, model, columns, evaluation="*test-*")
    assert [(s.file, s.split) for s in manifest.shards] == [
        ("deep/test-0.parquet", "evaluation"),
        ("train-0.parquet", "train"),
    ]
    assert [(s.name, s.rows, s.trained_tokens) for s in manifest.sources] == [
        ("a", 2, 2),
        ("b", 2, 2),
    ]
    assert verify(folder) == []
    inspect(folder, 2, Console(quiet=True))


def test_keys_are_stable_and_differ_between_rows_and_files(tmp_path, model):
    ids = [[number % VOCABULARY] for number in range(100)]
    folder = write(tmp_path / "keys", "a.parquet", 30, input_ids=ids)
    write(folder, "b.parquet", 100, input_ids=list(reversed(ids)))
    index(folder, model)

    def keys():
        manifest = read_manifest(folder)
        return [
            read_row_group(pq.ParquetFile(folder / shard.file), group, manifest, shard)["row_key"]
            for shard in manifest.shards
            for group in range(len(shard.row_groups))
        ]

    found = keys()
    assert [len(part) for part in found] == [30, 30, 30, 10, 100]
    flat = [key for part in found for key in part.to_pylist()]
    assert len(set(flat)) == 200
    index(folder, model)
    assert [key for part in keys() for key in part.to_pylist()] == flat


BAD = {
    "shifted labels": (
        {"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [4, -100]]},
        "row group 0: row 1: a label is neither its token nor -100; labels must not be shifted",
    ),
    "short labels": (
        {"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3]]},
        "row group 0: row 1: labels is not as long as the ids",
    ),
    "hole": (
        {"input_ids": [[1], [2, 3, 4]], "attention_mask": [[1], [1, 0, 1]]},
        "row group 0: row 1: attention_mask has a hole in the middle",
    ),
    "null": ({"input_ids": [[1], None]}, "row group 0: row 1: input_ids is null"),
    "null id": ({"input_ids": [[1], [None]]}, "row group 0: row 1: input_ids holds a null"),
    "large id": (
        {"input_ids": [[1], [40]]},
        "row group 0: column input_ids, row 1: id 40; ids from 1 to 40, the tokenizer has 40",
    ),
    "id of 64 bits": (
        {"input_ids": [[1], [1 << 40]]},
        "row group 0: row 1: id 1099511627776 cannot be one",
    ),
    "empty row": (
        {"input_ids": [[1], []]},
        "row group 0: column input_ids, row 1: rows of 0 to 1 tokens, not 1 to ",
    ),
    "outside": (
        {"input_ids": [[1, 2]], "cu_seqlens": [[0, 3, 4]]},
        "row group 0: row 0: cu_seqlens points outside of it",
    ),
    "lengths": (
        {"input_ids": [[1, 2], [3]], "document_lengths": [[2], [2]]},
        "row group 0: row 1: document_lengths do not sum to its length",
    ),
    "no ids": (
        {"tokens": [[1]], "labels": [[1]]},
        "no column input_ids among labels, tokens; name it with --column input_ids=NAME",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_cannot_be_trained_on_are_named(tmp_path, model, case):
    columns, message = BAD[case]
    folder = write(tmp_path / "bad", **columns)
    with pytest.raises(DataError) as caught:
        index(folder, model)
    assert str(caught.value).startswith(f"{folder}/part-0.parquet: {message}")
    assert not (folder / "manifest.json").exists()


def test_what_is_no_foreign_directory_is_named(tmp_path, model):
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(DataError, match=r"no \*\.parquet in it"):
        index(folder, model)
    (folder / "a.parquet").write_text("x")
    with pytest.raises(DataError, match=r"a\.parquet: not readable as Parquet"):
        index(folder, model)
    with pytest.raises(ConfigError, match="--column ids=x: write ROLE=NAME, a role of: input_ids,"):
        parse_columns(["ids=x"], None, folder / "a.parquet")
    write(folder, "a.parquet", input_ids=[[1]], labels=[[1]])
    write(folder, "b.parquet", input_ids=[[1]])
    with pytest.raises(DataError, match=r"b\.parquet: no column labels, which the first file has"):
        index(folder, model)


def make_rows(count):
    """Rows of two documents each, the first halves of which are not trained."""
    numbers = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        lengths = numbers.integers(2, 20, 2).tolist()
        ids = numbers.integers(0, VOCABULARY, sum(lengths)).tolist()
        half = lengths[0] // 2
        rows.append((ids, [False] * half + [True] * (len(ids) - half), lengths))
    return rows


@pytest.mark.slow
def test_files_of_spark_are_read(tmp_path, model, spark):
    rows = make_rows(50)
    frame = spark.session.createDataFrame(
        [
            (ids, [i if m else -100 for i, m in zip(ids, mask, strict=True)], lengths, "spark")
            for ids, mask, lengths in rows
        ],
        "input_ids array<int>, labels array<bigint>, document_lengths array<int>, source string",
    )
    folder = tmp_path / "spark"
    frame.repartition(3).write.parquet(str(folder))
    manifest = index(folder, model)
    assert len(manifest.shards) == 3
    assert sorted(rows_of(folder)) == sorted((*row, "spark") for row in rows)
    assert verify(folder) == []


def test_files_of_datasets_are_read(tmp_path, model):
    datasets = pytest.importorskip("datasets")
    rows = make_rows(50)
    width = max(len(ids) for ids, _, _ in rows)

    def padded(values, filling):
        return [*values, *[filling] * (width - len(values))]

    columns = {
        "input_ids": [padded(ids, 0) for ids, _, _ in rows],
        "attention_mask": [padded([1] * len(ids), 0) for ids, _, _ in rows],
        "labels": [
            padded([i if m else -100 for i, m in zip(ids, mask, strict=True)], -100)
            for ids, mask, _ in rows
        ],
    }
    folder = tmp_path / "hf"
    folder.mkdir()
    dataset = datasets.Dataset.from_dict(columns)
    dataset.to_parquet(str(folder / "train-00000-of-00001.parquet"), batch_size=16)
    index(folder, model, source="hf")
    assert rows_of(folder) == [(ids, mask, [len(ids)], "hf") for ids, mask, _ in rows]
    assert verify(folder) == []


def test_a_directory_of_ours_without_its_manifest_can_be_indexed(tmp_path, model):
    folder = write(
        tmp_path / "ours",
        input_ids=[[1, 2], [3, 4]],
        loss_mask=[None, [True, False]],
        document_lengths=[[1, 1], [2]],
        source=["a", "b"],
        row_key=pa.array([5, 1 << 63], pa.uint64()),
    )
    index(folder, model)
    assert rows_of(folder) == [
        ([1, 2], [True, True], [1, 1], "a"),
        ([3, 4], [True, False], [2], "b"),
    ]
    assert verify(folder) == []


def test_a_directory_of_prepare_is_left_alone(tmp_path, model):
    folder = write(tmp_path / "mine", input_ids=[[1]])
    manifest = index(folder, model)
    blend = Blend((folder,), tmp_path / "out", 1)
    with pytest.raises(DataError, match=r"only indexed.*prepare it as a source"):
        read_inputs(blend)
    write_manifest(folder, manifest.model_copy(update={"columns": None}))
    with pytest.raises(DataError, match="has the manifest of `headrace prepare`"):
        index(folder, model)


def test_columns_are_detected_by_name(tmp_path):
    folder = write(
        tmp_path / "x", input_ids=[[1]], labels=[[1]], loss_mask=[[True]], cu_seqlens=[[0, 1]]
    )
    assert parse_columns([], None, find_files(folder)[0]) == ForeignColumns(
        loss_mask="loss_mask", cu_seqlens="cu_seqlens"
    )
    assert parse_columns(["loss_mask=", "labels=labels"], None, find_files(folder)[0]) == (
        ForeignColumns(labels="labels", cu_seqlens="cu_seqlens")
    )
