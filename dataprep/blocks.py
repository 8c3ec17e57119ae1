"""One block of documents to rows: a pure function of documents, config and tokenizer."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from headrace.dataprep.documents import Document, Reject, read_documents, refuse
from headrace.dataprep.overlong import fit_documents
from headrace.dataprep.packing import pack_documents
from headrace.dataprep.task_stats import TaskStats, add_counts
from headrace.dataprep.tasks import Task
from headrace.dataprep.tokenizer import Ids, TokenizerSpec, encode_documents
from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.prepare_config import PrepareConfig
from headrace.schemas.shard_format import EVALUATION, SPLITS, TRAIN, shard_schema


@dataclass(frozen=True)
class Block:
    """Consecutive documents of one task, with the refused ones in their places."""

    source: str
    task: int  # its number in the source
    number: int  # in the task
    items: list[Document | Reject]


@dataclass(frozen=True)
class BlockRows:
    """What a block became: rows of each split in packing order, the refused, and the counts."""

    rows: dict[str, pa.Table]
    rejects: list[Reject]
    stats: TaskStats


def read_blocks(config: PrepareConfig, task: Task) -> Iterator[Block]:
    """Cut a task's documents into blocks of about `block_bytes` characters of text."""
    items: list[Document | Reject] = []
    number, size = 0, 0
    for piece in task.pieces:
        for item in read_documents(task.source, piece):
            items.append(item)
            size += len(item.text) if isinstance(item, Document) else 0
            if size >= config.block_bytes:
                yield Block(task.source.name, task.number_in_source, number, items)
                items, number, size = [], number + 1, 0
    if items:
        yield Block(task.source.name, task.number_in_source, number, items)


def process_block(config: PrepareConfig, tokenizer: TokenizerSpec, block: Block) -> BlockRows:
    """Tokenise, split off evaluation documents, pack, and give each row its key."""
    documents = [item for item in block.items if isinstance(item, Document)]
    rejects = [item for item in block.items if isinstance(item, Reject)]
    encoded: dict[str, list[Ids]] = {split: [] for split in SPLITS}
    for document, ids in zip(
        documents,
        encode_documents(tokenizer, [document.text for document in documents]),
        strict=True,
    ):
        if len(ids):
            encoded[choose_split(config, document.text)].append(ids)
        else:
            rejects.append(refuse(document.place, "empty document", "the tokenizer gives no token"))
    fitted = {
        split: fit_documents(ids, config.sequence_len, config.overlong)
        for split, ids in encoded.items()
    }
    rows = {
        split: pack(config, block, split, fit.documents)
        for split, fit in fitted.items()
        if fit.documents
    }
    lengths = Counter(len(ids) for documents_ids in encoded.values() for ids in documents_ids)
    stats = TaskStats(
        documents=lengths.total(),
        tokens_in=sum(length * count for length, count in lengths.items()),
        rows={split: table.num_rows for split, table in rows.items()},
        tokens={split: count_tokens(table) for split, table in rows.items()},
        tokens_dropped=add_counts(fit.tokens_dropped for fit in fitted.values()),
        documents_dropped=add_counts(fit.documents_dropped for fit in fitted.values()),
        rejects=dict(Counter(reject.reason for reject in rejects)),
        document_lengths=dict(lengths),
    )
    return BlockRows(rows, rejects, stats)


def choose_split(config: PrepareConfig, text: str) -> str:
    """The split of a document, by its content alone: duplicates never lie in both."""
    key = derive_seed(config.seed, "evaluation").to_bytes(8, "little")
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
    share = int.from_bytes(digest, "little") / 2**64
    return EVALUATION if share < config.evaluation_fraction else TRAIN


def row_key(seed: int, source: str, split: str, task: int, block: int, row: int) -> int:
    """The 64-bit order key of a row: uniform, so that sorting by it shuffles."""
    return derive_seed(seed, "row", source, split, task, block, row)


def pack(config: PrepareConfig, block: Block, split: str, documents: list[Ids]) -> pa.Table:
    """The rows of one split of a block, in packing order, with every column of a shard."""
    input_ids, document_lengths = pack_documents(documents, config.packing, config.sequence_len)
    keys = [
        row_key(config.seed, block.source, split, block.task, block.number, row)
        for row in range(len(input_ids))
    ]
    schema = shard_schema()
    columns = {
        "input_ids": input_ids,
        "loss_mask": pa.nulls(len(keys), schema.field("loss_mask").type),
        "document_lengths": document_lengths,
        "source": source_column(config, block.source, len(keys)),
        "row_key": pa.array(keys, pa.uint64()),
        "control_class": pa.nulls(len(keys), pa.int8()),
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def source_column(config: PrepareConfig, name: str, rows: int) -> pa.DictionaryArray:
    """One source's name for each row, over the dictionary of all names, equal in every file."""
    names = [source.name for source in config.sources]
    indices = np.full(rows, names.index(name), dtype=np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(names))


def count_tokens(table: pa.Table) -> int:
    """Tokens in all rows of a table."""
    return sum(len(chunk.flatten()) for chunk in table["input_ids"].chunks)


def sort_rows(tables: Iterable[pa.Table]) -> pa.Table:
    """All rows in the order of their keys; equal keys keep the order in which they came."""
    table = pa.concat_tables(tables).combine_chunks()
    order = np.argsort(table["row_key"].to_numpy(), kind="stable")
    return table.take(pa.array(order)).combine_chunks()
