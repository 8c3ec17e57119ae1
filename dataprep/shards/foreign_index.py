"""A manifest for Parquet that something else wrote: Spark, jllm, Hugging Face's `datasets`."""

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from headrace.dataprep.passes.shard_writer import count_trained, describe_row_group, with_checksums
from headrace.dataprep.rows.task_stats import quantiles
from headrace.dataprep.shards.verify import parquet_files
from headrace.dataprep.text.tokenizer import TOKENIZER_NAME
from headrace.dataprep.text.tokenizer_spec import special_tokens
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.fingerprint import file_sha256, fingerprint
from headrace.schemas.progress import Progress, silent
from headrace.schemas.shards.foreign_columns import ForeignColumns
from headrace.schemas.shards.manifest import (
    Manifest,
    RowGroupRecord,
    ShardRecord,
    SourceRecord,
    TokenizerRecord,
    TokenLedger,
)
from headrace.schemas.shards.manifest_file import read_manifest, write_manifest
from headrace.schemas.shards.parquet_pages import reader_of
from headrace.schemas.shards.row_checks import problems_in_rows
from headrace.schemas.shards.shard_checks import check_unpacked
from headrace.schemas.shards.shard_format import EVALUATION, MANIFEST_NAME, SPLITS, TRAIN
from headrace.schemas.shards.shard_rows import read_row_group, repeated_text
from headrace.schemas.shards.tokenizer_content import content_fingerprint
from headrace.schemas.shards.unpacked_sizes import unpacked_problem

logger = logging.getLogger(__name__)

Split = Literal["train", "evaluation"]
PACKING = "foreign"
LARGE_ROW_GROUP = 1 << 25  # tokens; the loader holds several row groups, decoded
ROLES = tuple(name for name in ForeignColumns.model_fields if name != "padding_id")


@dataclass
class SourceCounts:
    """Sums over the rows of one source."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)  # of documents

    def record(self, name: str) -> SourceRecord:
        return SourceRecord(
            name=name,
            documents=self.lengths.total(),
            rejected_documents=0,
            rows=self.rows,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            document_length_quantiles=quantiles(self.lengths),
        )


def index(
    directory: Path,
    tokenizer: Path,
    columns: ForeignColumns | None = None,
    evaluation: str | None = None,
    source: str | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Read all Parquet files of a directory, check their rows, and write a manifest beside them.

    Args:
        tokenizer: model directory, or tokenizer.json, that the ids come from.
        columns: which columns mean what. Default: by their names in the first file.
        evaluation: pattern of the files, as in `test-*`, that make the evaluation split.
        source: name of rows without a source of their own. Default: the directory's name.
        progress: shows which file is read.

    Raises:
        DataError: no files, or rows that cannot be trained on, with file, row group and row.
    """
    check_not_ours(directory)
    paths = find_files(directory)
    columns = columns or detect_columns(paths[0])
    manifest = Manifest(
        tokenizer=read_tokenizer(tokenizer),
        sequence_len=np.iinfo(np.int32).max,  # not known yet
        packing=PACKING,
        seed=0,
        config_fingerprint=fingerprint(columns.model_dump(mode="json")),
        inputs_fingerprint=fingerprint([[str(path.name), path.stat().st_size] for path in paths]),
        shards=[],
        sources=[SourceCounts().record(source or directory.resolve().name)],
        ledger=TokenLedger(tokens_in=0, tokens_out={}, tokens_dropped={}),
        columns=columns,
    )
    counts: dict[str, SourceCounts] = {}
    padding = longest = 0
    shards = []
    for path in progress(paths, [path.stat().st_size for path in paths], "index"):
        name = path.relative_to(directory).as_posix()
        held_out = evaluation is not None and fnmatch(name, evaluation)
        split: Split = EVALUATION if held_out else TRAIN
        shard, stored, most = index_file(path, name, split, manifest, counts)
        shards.append(shard)
        padding += stored - shard.tokens
        longest = max(longest, most)
    finished = finish(manifest, shards, counts, longest, padding)
    warn_of_large_row_groups(finished)
    copy_tokenizer(tokenizer, directory)
    write_manifest(directory, finished)
    return finished


def check_not_ours(directory: Path) -> None:
    """A directory that `prepare` wrote has its manifest already."""
    if (directory / MANIFEST_NAME).is_file() and read_manifest(directory).columns is None:
        raise DataError(f"{directory}: has the manifest of `headrace prepare`; nothing to index")


def find_files(directory: Path) -> list[Path]:
    """The directory's Parquet files; there must be one."""
    found = parquet_files(directory)
    if not found:
        raise DataError(f"{directory}: no *.parquet in it; give the directory that holds the files")
    return found


def detect_columns(path: Path) -> ForeignColumns:
    """Columns by their usual names; of several that tell the same the first below is taken."""
    names = set(open_parquet(path).schema_arrow.names)
    if "input_ids" not in names:
        known = ", ".join(sorted(names))
        raise DataError(
            f"{path}: no column input_ids among {known}; name it with --column input_ids=NAME"
        )

    def first(*candidates: str) -> dict[str, str]:
        return dict([(name, name) for name in candidates if name in names][:1])

    return ForeignColumns(
        **first("loss_mask", "labels"),
        **first("attention_mask"),
        **first("document_lengths", "cu_seqlens", "position_ids"),
        **first("source"),
        **first("row_key"),
    )


def parse_columns(given: Sequence[str], padding_id: int | None, path: Path) -> ForeignColumns:
    """`ROLE=NAME` options over what the names of the first file tell; `ROLE=` means none."""
    chosen: dict[str, str | int | None] = {"padding_id": padding_id}
    for option in given:
        role, equals, name = option.partition("=")
        if not equals or role not in ROLES:
            raise ConfigError(f"--column {option}: write ROLE=NAME, a role of: {', '.join(ROLES)}")
        chosen[role] = name or None
    found = ForeignColumns() if "input_ids" in chosen else detect_columns(path)
    return found.model_copy(update=chosen)


def open_parquet(path: Path, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(
            path, read_dictionary=list(dictionaries), page_checksum_verification=True
        )
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable as Parquet ({error})") from None


def index_file(
    path: Path,
    name: str,
    split: Split,
    manifest: Manifest,
    counts: dict[str, SourceCounts],
) -> tuple[ShardRecord, int, int]:
    """One file's record, its tokens with padding, and the length of its longest row."""
    record = ShardRecord(
        file=name,
        split=split,
        rows=0,
        tokens=0,
        trained_tokens=0,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        row_groups=[],
    )
    groups: list[RowGroupRecord] = []
    trained = stored = longest = 0
    assert manifest.columns is not None
    with open_parquet(path, repeated_text(manifest)) as file, path.open("rb") as pages:
        missing = set(manifest.columns.names()) - set(file.schema_arrow.names)
        if missing:
            raise DataError(f"{path}: no column {min(missing)}, which the first file has")
        for group in range(file.num_row_groups):
            check_row_group(file.metadata.row_group(group), manifest, pages, group)
            rows = read_rows(file, group, manifest, record, path)
            groups.append(describe_row_group(file.metadata.row_group(group), rows))
            check_place(file.metadata.row_group(group), groups[-1], f"{path}: row group {group}")
            record = record.model_copy(update={"row_groups": list(groups)})
            count_sources(rows, counts)
            trained += count_trained(rows)
            ids = file.read_row_group(group, columns=[manifest.columns.input_ids])[0]
            stored += pc.sum(pc.list_value_length(ids)).as_py() or 0
            lengths = pc.list_value_length(rows["input_ids"])
            longest = max(longest, pc.max(lengths).as_py() or 0)
    totals = {
        "rows": sum(group.rows for group in groups),
        "tokens": sum(group.tokens for group in groups),
        "trained_tokens": trained,
    }
    return with_checksums(path, record.model_copy(update=totals)), stored, longest


def check_row_group(
    group: pq.RowGroupMetaData, manifest: Manifest, pages: BinaryIO, number: int
) -> None:
    """Check that a row group does not unpack to far more than it is.

    Raises:
        DataError: it does, or its pages are not what the footer says.
    """
    assert manifest.columns is not None
    where = f"{pages.name}: row group {number}"
    if problem := unpacked_problem(group, None):
        raise DataError(f"{where}: {problem}")
    try:
        check_unpacked(group, manifest.columns.names(), reader_of(pages))
    except ValueError as error:
        raise DataError(f"{where}: {error}; write the file anew") from None


def read_rows(
    file: pq.ParquetFile, group: int, manifest: Manifest, record: ShardRecord, path: Path
) -> pa.Table:
    """The checked rows of a row group."""
    where = f"{path}: row group {group}"
    try:
        rows = read_row_group(file, group, manifest, record)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise DataError(f"{where}: {error}") from None
    for problem in problems_in_rows(rows, manifest):
        raise DataError(f"{where}: {problem}")
    return rows


def check_place(group: pq.RowGroupMetaData, record: RowGroupRecord, where: str) -> None:
    """Its columns must lie together, so that they can be fetched at once."""
    columns = [group.column(index) for index in range(group.num_columns)]
    start = min(c.dictionary_page_offset or c.data_page_offset for c in columns)
    end = max(
        (c.dictionary_page_offset or c.data_page_offset) + c.total_compressed_size for c in columns
    )
    if (start, end - start) != (record.byte_offset, record.bytes):
        raise DataError(f"{where}: its columns do not lie together; write the file anew")


def count_sources(rows: pa.Table, counts: dict[str, SourceCounts]) -> None:
    """Add rows to the counts of their sources."""
    for name in pc.unique(rows["source"]).to_pylist():
        own = rows.filter(pc.equal(rows["source"].cast(pa.string()), name))
        count = counts.setdefault(name, SourceCounts())
        count.rows += own.num_rows
        count.tokens += pc.sum(pc.list_value_length(own["input_ids"])).as_py()
        count.trained_tokens += count_trained(own)
        lengths, times = np.unique(
            pc.list_flatten(own["document_lengths"]).to_numpy(), return_counts=True
        )
        count.lengths.update(dict(zip(lengths.tolist(), times.tolist(), strict=True)))


def finish(
    manifest: Manifest,
    shards: list[ShardRecord],
    counts: dict[str, SourceCounts],
    longest: int,
    padding: int,
) -> Manifest:
    """The manifest with all that was counted; rows without a source keep their place as first."""
    out = {split: sum(shard.tokens for shard in shards if shard.split == split) for split in SPLITS}
    return manifest.model_copy(
        update={
            "sequence_len": longest,
            "shards": shards,
            "sources": [count.record(name) for name, count in sorted(counts.items())],
            "ledger": TokenLedger(
                tokens_in=sum(out.values()) + padding,
                tokens_out=out,
                tokens_dropped={"padding": padding} if padding else {},
            ),
        }
    )


def read_tokenizer(path: Path) -> TokenizerRecord:
    """The identity of a model directory's tokenizer, or of a tokenizer.json itself."""
    file = path / TOKENIZER_NAME if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: not found; give the model directory that the ids come from")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  the bindings raise plain Exception
        raise DataError(f"{file}: not a tokenizer ({error}); replace the file") from None
    return TokenizerRecord(
        fingerprint=file_sha256(file),
        content_fingerprint=content_fingerprint(file.read_bytes(), file),
        vocabulary_size=max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        special_tokens=special_tokens(file.parent, tokenizer),
    )


def copy_tokenizer(path: Path, directory: Path) -> None:
    """Put the tokenizer beside the rows, so that they can be decoded."""
    file = path / TOKENIZER_NAME if path.is_dir() else path
    if file.resolve() != (directory / TOKENIZER_NAME).resolve():
        shutil.copyfile(file, directory / TOKENIZER_NAME)


def warn_of_large_row_groups(manifest: Manifest) -> None:
    """jllm and others write one row group a file, and the loader holds several of them."""
    groups = [group for shard in manifest.shards for group in shard.row_groups]
    largest = max((group.tokens for group in groups), default=0)
    if largest > LARGE_ROW_GROUP:
        logger.warning(
            "the largest row group has %s tokens: training holds %.1f GiB for each of the "
            "loader.shuffle_window it has in hand; lower that, or write the files with smaller "
            "row groups",
            f"{largest:,}",
            4 * largest / 2**30,
        )
