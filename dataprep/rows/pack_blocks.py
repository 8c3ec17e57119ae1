"""Documents of one block, packed into rows of each split and counted."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from headrace.dataprep.formats.document_ends import token_ids
from headrace.dataprep.input.records import Reject
from headrace.dataprep.rows.encoded_spool import EncodedBlock
from headrace.dataprep.rows.overlong import Fitted, drop_tail, fit_samples
from headrace.dataprep.rows.packing import full_mask, pack_samples, prefix_rows
from headrace.dataprep.rows.picture_rows import row_picture_bytes, row_pictures
from headrace.dataprep.rows.row_keys import row_keys
from headrace.dataprep.rows.row_tables import count_tokens
from headrace.dataprep.rows.task_stats import TaskStats, add_counts
from headrace.dataprep.text.row_format import Document
from headrace.dataprep.text.sample import Sample, pair
from headrace.dataprep.text.tokenizer import control_ids
from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.prepare.source_config import SourceConfig
from headrace.schemas.shards.arrow_numbers import as_arrow
from headrace.schemas.shards.shard_format import IMAGES_FIELD, SPLITS, shard_schema

REFUSED = "refused"  # begins the reason for which pictures of a refused document are dropped


@dataclass(frozen=True)
class BlockRows:
    """Result of a block: rows of each split in packing order, refused records, and counts."""

    source: str
    rows: dict[str, pa.Table]
    rejects: list[Reject]
    stats: TaskStats


def pack_block(config: PrepareConfig, tokenizer: TokenizerSpec, block: EncodedBlock) -> BlockRows:
    """Pack the documents of each split into rows, and count everything."""
    options = block_options(config, block.source, tokenizer)
    row_len = config.sequence_len - len(options.prefix)
    overlong = config.overlong_of(source_named(config, block.source))
    samples: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for document in block.documents:
        samples[document.split] += (
            [mask_sample(sample, options.masked) for sample in document.samples]
            if options.masked
            else document.samples
        )
    fitted = {
        split: drop_tail(found, row_len)
        if config.drop_tails
        else fit_samples(found, row_len, overlong)
        for split, found in samples.items()
    }
    rows = {
        split: pack(config, block, split, fit.samples, options)
        for split, fit in fitted.items()
        if fit.samples
    }
    lengths = Counter(sample.tokens for found in samples.values() for sample in found)
    dropped = [document.dropped for document in block.documents if document.dropped]
    emptied = [document for document in block.documents if not document.samples]
    prefixes = sum(table.num_rows for table in rows.values()) * len(options.prefix)
    stats = TaskStats(
        documents=lengths.total() + len(emptied),
        tokens_in=sum(length * count for length, count in lengths.items())
        + sum(add_counts(dropped).values())
        + prefixes,
        rows={split: table.num_rows for split, table in rows.items()},
        tokens={split: count_tokens(table) for split, table in rows.items()},
        trained_tokens={
            split: fitted[split].trained_tokens + table.num_rows * len(options.prefix)
            for split, table in rows.items()
        },
        tokens_dropped=add_counts([*dropped, *(fit.tokens_dropped for fit in fitted.values())]),
        documents_dropped=add_counts(
            [
                Counter(last_reason(document) for document in emptied),
                *(fit.documents_dropped for fit in fitted.values()),
            ]
        ),
        rejects=dict(Counter(reject.reason for reject in block.rejects)),
        document_lengths=dict(lengths),
        notes={name: count for name, count in block.notes.items() if count},
        **(count_block_pictures(block, fitted, rows) if config.images else {}),
    )
    return BlockRows(block.source, rows, block.rejects, stats)


def count_block_pictures(
    block: EncodedBlock, fitted: dict[str, Fitted], rows: dict[str, pa.Table]
) -> dict[str, Any]:
    """Return the counts of a block's pictures: in by its documents, out by its rows."""
    documents = block.documents
    refused = Counter[str]()
    for reject in block.rejects:
        refused[f"{REFUSED}: {reject.reason}"] += reject.pictures
    lost = [*(document.lost for document in documents), {k: v for k, v in refused.items() if v}]
    held = sum(len(sample.pictures) for document in documents for sample in document.samples)
    return {
        "pictures_in": held + sum(add_counts(lost).values()),
        "pictures": {split: int(row_pictures(table).sum()) for split, table in rows.items()},
        "picture_bytes": {s: int(row_picture_bytes(table).sum()) for s, table in rows.items()},
        "pictures_dropped": add_counts([*lost, *(fit.pictures_dropped for fit in fitted.values())]),
    }


def last_reason(document: Document) -> str:
    """Why a document has no samples left."""
    return next(reversed(document.dropped))


class Options(NamedTuple):
    """Options of the config that concern the rows of one source, as tokens."""

    prefix: list[int]
    masked: list[int]
    control_class: int | None


def block_options(config: PrepareConfig, name: str, tokenizer: TokenizerSpec) -> Options:
    """The options of a source.

    Raises:
        DataError: a token id of the config does not exist, or the prefix fills the row.
    """
    source = source_named(config, name)
    prefix = token_ids(tokenizer, config.sequence_prefix)
    if len(prefix) >= config.sequence_len:
        raise DataError(f"sequence_prefix has {len(prefix)} tokens, which leaves no room in a row")
    return Options(prefix, masked_ids(source, tokenizer), source.control_class)


def source_named(config: PrepareConfig, name: str) -> SourceConfig:
    """The source of a block; names are unique."""
    return next(source for source in config.sources if source.name == name)


def masked_ids(source: SourceConfig, tokenizer: TokenizerSpec) -> list[int]:
    """The tokens of a source that are never trained."""
    if source.mask_tokens is True:
        return sorted(control_ids(tokenizer))
    return [token for value in source.mask_tokens for token in token_ids(tokenizer, value)]


def mask_sample(sample: Sample, masked: list[int]) -> Sample:
    """A sample in which some tokens are not trained."""
    if not masked:
        return sample
    sides = [
        side._replace(trained=full_mask(side) & ~np.isin(side.ids, masked))
        for side in sample.sides()
    ]
    return pair(*sides) if len(sides) == 2 else sides[0]


def pack(
    config: PrepareConfig,
    block: EncodedBlock,
    split: str,
    samples: list[Sample],
    options: Options,
) -> pa.Table:
    """The rows of one split of a block, in packing order, with every column of a shard."""
    row_len = config.sequence_len - len(options.prefix)
    packed = prefix_rows(pack_samples(samples, config.packing, row_len), options.prefix)
    rows = len(packed.input_ids)
    keys = row_keys(config.seed, block.source, split, block.task, block.number, rows)
    schema = shard_schema(config.kind, config.images is not None)
    columns = packed._asdict() | {
        "source": source_column(config, block.source, rows),
        "row_key": as_arrow(keys),
        "control_class": pa.array([options.control_class] * rows, pa.int8()),
    }
    if columns["images"] is None:
        columns["images"] = pa.nulls(len(keys), IMAGES_FIELD.type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def source_column(config: PrepareConfig, name: str, rows: int) -> pa.DictionaryArray:
    """One source's name for each row, over the dictionary of all names, equal in every file."""
    names = [source.name for source in config.sources]
    indices = np.full(rows, names.index(name), dtype=np.int32)
    return pa.DictionaryArray.from_arrays(as_arrow(indices), pa.array(names))
