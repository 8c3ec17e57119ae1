"""One block of documents to rows: a pure function of documents, config and tokenizer."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from headrace.dataprep.images.references import (
    FIELDS,
    count_pictures,
    listed_pictures,
    picture_bytes,
)
from headrace.dataprep.input.pieces import Task
from headrace.dataprep.input.readers import read_records
from headrace.dataprep.input.records import Record, Reject, characters, with_fields
from headrace.dataprep.input.streams import refuse, refuse_large
from headrace.dataprep.rows.contamination import EvaluationSets, decontaminate
from headrace.dataprep.rows.encoded_spool import EncodedBlock
from headrace.dataprep.rows.filters import apply_filters
from headrace.dataprep.rows.pack_blocks import BlockRows, pack_block, source_named
from headrace.dataprep.rows.split_and_sample import choose_split, take_sample
from headrace.dataprep.rows.task_stats import add_counts
from headrace.dataprep.text.row_format import Document, Encoded, Format
from headrace.dataprep.text.sample import Sample
from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.schemas.prepare.images_config import ImagesConfig
from headrace.schemas.prepare.prepare_config import PrepareConfig

SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Block:
    """Consecutive records of one task, with the refused ones in their places."""

    source: str
    task: int  # its number in the source
    number: int  # in the task
    items: list[Record | Reject]


def read_blocks(config: PrepareConfig, row_format: Format, task: Task) -> Iterator[Block]:
    """Cut a task's records into blocks of about `block_bytes` characters in the fields read."""
    items: list[Record | Reject] = []
    number, size, limit = 0, 0, config.max_record_bytes
    for piece in task.pieces:
        for item in read_records(task.source, piece, row_format.columns, limit):
            if isinstance(item, Record):
                length = characters(item.fields)
                size += block_size(config, item, length)
                item = refuse_large(item.place, limit) if length > limit else item
            items.append(item)
            if size >= config.block_bytes:
                yield Block(task.source.name, task.number_in_source, number, items)
                items, number, size = [], number + 1, 0
    if items:
        yield Block(task.source.name, task.number_in_source, number, items)


def block_size(config: PrepareConfig, record: Record, length: int) -> int:
    """Return what a record takes of a block: its characters, and so much for each picture."""
    if config.images is None:
        return length
    share = config.block_bytes // config.images.block_pictures
    return length - picture_bytes(record.fields) + share * count_pictures(record.fields)


def process_block(
    config: PrepareConfig,
    tokenizer: TokenizerSpec,
    row_format: Format,
    sets: EvaluationSets | None,
    block: Block,
) -> BlockRows:
    """Tokenize, filter, split off evaluation documents, pack, and give each row its key."""
    encoded = settle(config, block, *encode_block(config, row_format, sets, block))
    return pack_block(config, tokenizer, encoded)


def settle(
    config: PrepareConfig, block: Block, encoded: list[Encoded], rejects: list[Reject]
) -> EncodedBlock:
    """Choose the split of each document; its text is not needed any more."""
    fixed = source_named(config, block.source).split
    documents = [
        Document(
            choose_split(config, document.content) if fixed == "auto" else fixed,
            document.samples,
            document.dropped,
            document.lost,
        )
        for document in encoded
    ]
    notes = add_counts(document.notes for document in encoded)
    return EncodedBlock(block.source, block.task, block.number, documents, rejects, notes)


def encode_block(
    config: PrepareConfig, row_format: Format, sets: EvaluationSets | None, block: Block
) -> tuple[list[Encoded], list[Reject]]:
    """Encode, filter and sample a block's records, and return them with the refused ones.

    Args:
        sets: which no document is to share runs of words with.
    """
    records = [item for item in block.items if isinstance(item, Record)]
    results = iter(encode_records(row_format, records))
    encoded: list[Encoded] = []
    rejects: list[Reject] = []
    for item in block.items:
        result = item if isinstance(item, Reject) else next(results)
        if config.images is not None and isinstance(item, Record):
            result = with_pictures(config.images, item, result)
        if isinstance(result, Reject):
            rejects.append(with_fields(result, item) if isinstance(item, Record) else result)
        else:
            encoded.append(result)
    filtered = decontaminate(sets, apply_filters(config.filters, encoded))
    return take_sample(config, source_named(config, block.source), filtered), rejects


def with_pictures(
    images: ImagesConfig, record: Record, result: Encoded | Reject
) -> Encoded | Reject:
    """Return the result of a record: refused if pictures fill other placeholders than it has; what
    is refused tells how many pictures it had.
    """
    if isinstance(result, Encoded):
        assert images.identity is not None, "the config is resolved"
        placeholder = images.identity["placeholder_id"]
        sides = [side for sample in result.samples for side in sample.sides()]
        if all(np.count_nonzero(s.ids == placeholder) == filled(s) for s in sides):
            return result
        result = refuse(record.place, "placeholder in a text", "a text holds the pictures' token")
    listed = {name: record.fields.get(name) for name in FIELDS}
    count = max(count_pictures(record.fields), sum(map(listed_pictures, listed.values())))
    return result._replace(pictures=count)


def filled(sample: Sample) -> int:
    """Return the placeholders that a sample's pictures fill."""
    return sum(picture.tokens for picture in sample.pictures)


def encode_records(row_format: Format, records: list[Record]) -> list[Encoded | Reject]:
    """Return what a format makes of records; one that breaks it is refused alone."""
    try:
        return list(row_format.encode(records))
    except BaseException as error:
        if not is_of_one_record(error):
            raise
    return [encode_alone(row_format, record) for record in records]


def encode_alone(row_format: Format, record: Record) -> Encoded | Reject:
    """Return what a format makes of one record."""
    try:
        (result,) = row_format.encode([record])
    except BaseException as error:
        if not is_of_one_record(error):
            raise
        reason = (" ".join(str(error).split()) or type(error).__name__)[:SHOWN_CHARACTERS]
        return refuse(record.place, "cannot be tokenized", reason)
    return result


def is_of_one_record(error: BaseException) -> bool:
    """Return whether an error may come from what stands in a record.

    `tokenizers` raises plain Exception, and PanicException where an expression of its
    `tokenizer.json` exhausts the engine; JSON in a string may be too deep or be no Unicode.
    """
    deep = isinstance(error, RecursionError | UnicodeError)
    return deep or type(error) is Exception or type(error).__name__ == "PanicException"
