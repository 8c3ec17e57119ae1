"""Whether a shard directory is what its manifest says: every byte, row and token of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from headrace.dataprep.blocks import sides
from headrace.dataprep.shard_writer import count_trained, describe_row_group
from headrace.dataprep.tokenizer import TOKENIZER_NAME
from headrace.dataprep.workspace import CONFIG_NAME, REJECTS_NAME
from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import file_sha256, fingerprint
from headrace.schemas.manifest import Manifest, ShardRecord, read_manifest
from headrace.schemas.shard_format import MANIFEST_NAME, shard_schema


def verify(directory: Path, console: Console | None = None) -> list[str]:
    """All problems of a shard directory, each beginning with a file's path; none if sound."""
    try:
        manifest = read_manifest(directory)
    except DataError as error:
        return [str(error)]
    problems = [*check_counts(directory, manifest), *check_other_files(directory, manifest)]
    shards = track(manifest.shards, "verify", console=console or Console(stderr=True))
    for shard in shards:
        problems += check_shard(directory / shard.file, shard, manifest)
    return problems


def check_counts(directory: Path, manifest: Manifest) -> Iterator[str]:
    """The manifest against itself: ledger, sources and shards tell the same totals."""
    path = directory / MANIFEST_NAME
    ledger = manifest.ledger
    if ledger.difference():
        yield f"{path}: the token ledger is off by {ledger.difference()}"
    for split, tokens in ledger.tokens_out.items():
        held = sum(shard.tokens for shard in manifest.split(split))
        if held != tokens:
            yield f"{path}: the ledger has {tokens} {split} tokens, the shards {held}"
    for name in ("rows", "tokens", "trained_tokens"):
        in_sources = sum(getattr(source, name) for source in manifest.sources)
        in_shards = sum(getattr(shard, name) for shard in manifest.shards)
        if in_sources != in_shards:
            yield f"{path}: the sources have {in_sources} {name}, the shards {in_shards}"


def check_other_files(directory: Path, manifest: Manifest) -> Iterator[str]:
    """The tokenizer's copy, the saved config, the rejects, and no extra shards."""
    tokenizer = directory / TOKENIZER_NAME
    if not tokenizer.is_file():
        yield f"{tokenizer}: missing"
    elif file_sha256(tokenizer) != manifest.tokenizer.fingerprint:
        yield f"{tokenizer}: not the tokenizer of these shards (its SHA-256 differs)"
    yield from check_settings(directory / CONFIG_NAME, manifest)
    yield from check_rejects(directory / REJECTS_NAME, manifest)
    known = {shard.file for shard in manifest.shards}
    for path in sorted(directory.rglob("*.parquet")):
        if path.relative_to(directory).as_posix() not in known:
            yield f"{path}: not in the manifest; remove it"


def check_settings(path: Path, manifest: Manifest) -> Iterator[str]:
    """The saved config against the manifest's fingerprint."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield f"{path}: cannot be read ({error})"
        return
    if fingerprint(settings) != manifest.config_fingerprint:
        yield f"{path}: not the config of these shards (its fingerprint differs)"


def check_rejects(path: Path, manifest: Manifest) -> Iterator[str]:
    """As many rejects as the sources count."""
    if not path.is_file():
        yield f"{path}: missing"
        return
    with path.open("rb") as lines:
        found = sum(1 for _ in lines)
    counted = sum(source.rejected_documents for source in manifest.sources)
    if found != counted:
        yield f"{path}: {found} lines, the sources count {counted} refused documents"


def check_shard(path: Path, shard: ShardRecord, manifest: Manifest) -> list[str]:
    """One Parquet file; its content is only read if its bytes are those that were written."""
    if not path.is_file():
        return [f"{path}: missing"]
    size = path.stat().st_size
    if size != shard.bytes:
        return [f"{path}: {size} bytes, {shard.bytes} were written"]
    if file_sha256(path) != shard.sha256:
        return [f"{path}: damaged (its SHA-256 differs)"]
    try:
        with pq.ParquetFile(path) as file:
            return [f"{path}: {problem}" for problem in check_content(file, shard, manifest)]
    except (pa.ArrowException, OSError) as error:
        return [f"{path}: not readable as Parquet ({error})"]


def check_content(file: pq.ParquetFile, shard: ShardRecord, manifest: Manifest) -> Iterator[str]:
    """Footer, row groups and rows of one shard."""
    expected = shard_schema(manifest.kind)
    if not file.schema_arrow.equals(expected):
        yield "its columns are not those of the shard format"
        return
    if file.schema_arrow.metadata != expected.metadata:
        yield f"its footer names {file.schema_arrow.metadata}, not {expected.metadata}"
    if file.num_row_groups != len(shard.row_groups):
        yield f"{file.num_row_groups} row groups, the manifest has {len(shard.row_groups)}"
        return
    totals = {"rows": 0, "tokens": 0, "trained_tokens": 0}
    last_key = -1
    for index, record in enumerate(shard.row_groups):
        rows = file.read_row_group(index)
        where = f"row group {index}"
        found = describe_row_group(file.metadata.row_group(index), rows)
        if found != record:
            yield f"{where}: {found}, the manifest has {record}"
        for problem in check_rows(rows, manifest, last_key):
            yield f"{where}: {problem}"
        last_key = int(rows["row_key"][-1].as_py())
        totals["rows"] += found.rows
        totals["tokens"] += found.tokens
        totals["trained_tokens"] += count_trained(rows)
    for name, total in totals.items():
        if total != getattr(shard, name):
            yield f"{total} {name}, the manifest has {getattr(shard, name)}"


def check_side(ids: pa.ChunkedArray, mask: pa.ChunkedArray, manifest: Manifest) -> Iterator[str]:
    """The ids and masks of one row group, on one side."""
    if ids.null_count:
        yield f"{ids.null_count} rows have no ids on one side"
        return
    values = pc.list_flatten(ids).to_numpy()
    size = manifest.tokenizer.vocabulary_size
    if len(values) and not (values.min() >= 0 and values.max() < size):
        yield f"ids from {values.min()} to {values.max()}, the tokenizer has {size}"
    lengths = pc.list_value_length(ids).to_numpy()
    if not np.all((lengths >= 1) & (lengths <= manifest.sequence_len)):
        yield f"rows of {lengths.min()} to {lengths.max()} tokens, not 1 to {manifest.sequence_len}"
    masked = pc.is_valid(mask)
    marks = pc.list_value_length(mask.filter(masked)).to_numpy()
    if not np.array_equal(marks, pc.list_value_length(ids.filter(masked)).to_numpy()):
        yield "loss_mask is not as long as input_ids"


def check_rows(rows: pa.Table, manifest: Manifest, last_key: int) -> Iterator[str]:
    """The rows of one row group; `last_key` is the key before them, -1 for none."""
    for ids, mask in sides(rows):
        yield from check_side(rows[ids], rows[mask], manifest)
    lengths = pc.list_value_length(rows["input_ids"]).to_numpy()
    pieces = pc.list_flatten(rows["document_lengths"]).to_numpy()
    owners = pc.list_parent_indices(rows["document_lengths"]).to_numpy()
    sums = np.bincount(owners, weights=pieces, minlength=rows.num_rows)
    if np.any(pieces < 1) or not np.array_equal(sums, lengths):
        yield "document_lengths do not sum to the rows' lengths"
    keys = rows["row_key"].to_numpy()
    if not np.all(keys[1:] >= keys[:-1]) or int(keys[0]) < last_key:
        yield "row keys are not sorted"
    strangers = set(pc.unique(rows["source"]).to_pylist()) - {s.name for s in manifest.sources}
    if strangers:
        yield f"rows of sources that the manifest does not have: {sorted(map(str, strangers))}"
