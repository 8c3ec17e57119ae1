"""Foreign Parquet with the same rows trains exactly as shards of `headrace prepare` do."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loaders import open_loader, open_stream
from runs import exact_metrics

from headrace.dataprep.shards.foreign_index import index
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.shards.row_groups import list_row_groups


def as_jllm(rows):
    starts = [np.cumsum([0, *lengths])[:-1].tolist() for lengths in rows["document_lengths"]]
    ids = rows["input_ids"]
    return {
        "input_ids": ids,
        "labels": labels_of(rows),
        "cu_seqlens": [[*s, len(i) - 1] for s, i in zip(starts, ids, strict=True)],
    }


def as_hugging_face(rows):
    """Padded to the longest row, left or right by turns, with positions that restart."""
    width = max(len(ids) for ids in rows["input_ids"])
    positions = [
        [place for length in lengths for place in range(length)]
        for lengths in rows["document_lengths"]
    ]
    columns = {
        "input_ids": (rows["input_ids"], 7),
        "attention_mask": ([[1] * len(ids) for ids in rows["input_ids"]], 0),
        "labels": (labels_of(rows), -100),
        "position_ids": (positions, 0),
    }
    return {
        name: [pad(row, width, filling, left=i % 2 == 1) for i, row in enumerate(values)]
        for name, (values, filling) in columns.items()
    }


def as_spark(rows):
    return {
        "input_ids": pa.array(rows["input_ids"], pa.list_(pa.int64())),
        "loss_mask": rows["loss_mask"],
        "document_lengths": rows["document_lengths"],
    }


def pad(values, width, filling, left):
    padding = [filling] * (width - len(values))
    return [*padding, *values] if left else [*values, *padding]


def labels_of(rows):
    return [
        ids if mask is None else [i if m else -100 for i, m in zip(ids, mask, strict=True)]
        for ids, mask in zip(rows["input_ids"], rows["loss_mask"], strict=True)
    ]


FORMATS = {"jllm": as_jllm, "hugging face": as_hugging_face, "spark": as_spark}


def rewrite(shards, folder, model, convert):
    """The same rows in the same row groups in another format, with source and key as columns."""
    folder.mkdir()
    for shard in read_manifest(shards).shards:
        file = pq.ParquetFile(shards / shard.file)
        tables = []
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            columns = convert(table.to_pydict())
            source, key = table["source"].cast(pa.string()), table["row_key"]
            tables.append(pa.table({**columns, "source": source, "row_key": key}))
        with pq.ParquetWriter(folder / shard.file, tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)
    index(folder, model, evaluation="evaluation-*")
    return folder


def batches(directory):
    manifest = read_manifest(directory)
    order = RowOrder(list_row_groups([manifest], "train"), seed=5, window=2)
    stream = open_stream(directory, manifest, order)
    return open_loader(stream, order.rows_per_epoch, manifest.sequence_len, micro_batch_size=2)


@pytest.mark.parametrize("name", FORMATS)
def test_batches_are_the_same_bits(tiny_model, tiny_shards, tmp_path, name):
    foreign = rewrite(tiny_shards, tmp_path / "foreign", tiny_model, FORMATS[name])
    pairs = zip(batches(tiny_shards), batches(foreign), strict=True)
    for ours, theirs in pairs:
        assert ours.input_ids.equal(theirs.input_ids)
        assert ours.labels.equal(theirs.labels)
        assert ours.document_lengths == theirs.document_lengths
        assert ours.rows == theirs.rows


@pytest.mark.slow
def test_losses_are_the_same_bits(tiny_model, tiny_shards, tmp_path, training):
    foreign = rewrite(tiny_shards, tmp_path / "foreign", tiny_model, as_hugging_face)
    settings = {"max_steps": 4, "evaluation__before_first_step": False}
    ours = training.run("ours", **settings)
    paths = {"datasets__0__path": str(foreign), "evaluation_datasets__0__path": str(foreign)}
    theirs = training.run("theirs", **settings, **paths)
    assert exact_metrics(theirs) == [
        line | {"name": "foreign"} if line["kind"] == "evaluation" else line
        for line in exact_metrics(ours)
    ]
