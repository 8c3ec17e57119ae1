"""Tokenized blocks on disk, for what must be known of the whole corpus before rows are packed."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.dataprep.images.picture import Picture
from headrace.dataprep.input.records import Reject
from headrace.dataprep.text.row_format import Document
from headrace.dataprep.text.sample import Sample

PICTURE_TYPE = pa.struct(
    [
        pa.field("tiles", pa.list_(pa.large_binary())),
        *(pa.field(name, pa.int32()) for name in Picture._fields[1:]),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("document", pa.int32()),
        pa.field("ids", pa.list_(pa.int32())),
        pa.field("trained", pa.list_(pa.bool_())),
        pa.field("rejected_ids", pa.list_(pa.int32())),
        pa.field("rejected_trained", pa.list_(pa.bool_())),
        pa.field("desirable", pa.bool_()),
        pa.field("pictures", pa.list_(PICTURE_TYPE)),
    ]
)

LISTS = ("ids", "trained", "rejected_ids", "rejected_trained")  # of a sample, in its order


class EncodedBlock(NamedTuple):
    """A block's documents and what was refused, each in input order; `notes` are counts of what
    formats saw in the documents."""

    source: str
    task: int  # its number in the source
    number: int  # in the task
    documents: list[Document]
    rejects: list[Reject]
    notes: dict[str, int] = {}  # noqa: RUF012  never written to


def write_encoded(path: Path, blocks: Iterable[EncodedBlock]) -> None:
    """Write blocks as Arrow IPC, a batch each: samples in columns, the rest as JSON beside them."""
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for block in blocks:
            writer.write_batch(sample_batch(block.documents), describe(block))


def read_encoded(path: Path) -> Iterator[EncodedBlock]:
    """The blocks that `write_encoded` wrote, one in memory at a time."""
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            batch, metadata = reader.get_batch_with_custom_metadata(index)
            yield restore(batch, json.loads(metadata["block"]))


def describe(block: EncodedBlock) -> dict[str, str]:
    """Return a block as metadata, without its samples."""
    value = {
        "place": (block.source, block.task, block.number),
        "documents": [(d.split, d.dropped, d.lost) for d in block.documents],
        "rejects": block.rejects,
        "notes": block.notes,
    }
    return {"block": json.dumps(value)}


def restore(batch: pa.RecordBatch, block: dict[str, Any]) -> EncodedBlock:
    """The block of a batch and its description."""
    documents = [Document(split, [], *counts) for split, *counts in block["documents"]]
    owners = batch.column("document").to_pylist()
    columns = (arrays(batch.column(name)) for name in LISTS)
    labels = batch.column("desirable").to_pylist()
    pictures = map(restored, batch.column("pictures").to_pylist())
    for owner, label, shown, *values in zip(owners, labels, pictures, *columns, strict=True):
        sample = Sample(*values)._replace(desirable=label, pictures=shown)
        documents[owner].samples.append(sample)
    rejects = [Reject(*reject) for reject in block["rejects"]]
    source, task, number = block["place"]
    return EncodedBlock(source, task, number, documents, rejects, block["notes"])


def sample_batch(documents: Sequence[Document]) -> pa.RecordBatch:
    """Return the samples of some documents as a batch, each with the number of its document."""
    samples = [sample for document in documents for sample in document.samples]
    counts = [len(document.samples) for document in documents]
    owners = np.repeat(np.arange(len(documents), dtype=np.int32), counts)
    columns = [
        lists([getattr(sample, name) for sample in samples], SCHEMA.field(name).type)
        for name in LISTS
    ]
    labels = pa.array([sample.desirable for sample in samples], pa.bool_())
    kept = [[p._asdict() for p in sample.pictures] or None for sample in samples]
    pictures = pa.array(kept, SCHEMA.field("pictures").type)
    return pa.record_batch([pa.array(owners), *columns, labels, pictures], schema=SCHEMA)


def restored(pictures: list[dict[str, Any]] | None) -> tuple[Picture, ...]:
    """Return the pictures of a sample."""
    return tuple(Picture(**p | {"tiles": tuple(p["tiles"])}) for p in pictures or ())


def lists(values: list[npt.NDArray[Any] | None], kind: pa.DataType) -> pa.ListArray:
    """Arrow lists of numpy arrays; None is null."""
    missing = np.array([value is None for value in values], dtype=np.bool_)
    if missing.all():
        return pa.nulls(len(values), kind)
    present = [value for value in values if value is not None]
    lengths = [0 if value is None else len(value) for value in values]
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    flat = pa.array(np.concatenate(present), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind, mask=pa.array(missing))


def arrays(column: pa.ListArray) -> Iterator[npt.NDArray[Any] | None]:
    """The lists of a column as numpy arrays; null is None."""
    flat = column.values.to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy()
    missing = column.is_null().to_numpy(zero_copy_only=False)
    for index, absent in enumerate(missing.tolist()):
        yield None if absent else flat[offsets[index] : offsets[index + 1]]
