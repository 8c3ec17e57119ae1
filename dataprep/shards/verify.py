"""Check that a shard directory is as its manifest says: every byte, row and token of it."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.dataprep.passes.shard_writer import count_trained, describe_row_group, with_checksums
from headrace.dataprep.rows.picture_rows import row_pictures
from headrace.dataprep.text.tokenizer import TOKENIZER_NAME
from headrace.dataprep.work.workspace import CONFIG_NAME, REJECTS_NAME
from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import file_sha256, fingerprint
from headrace.schemas.outside_text import parse_json, read_text
from headrace.schemas.progress import Progress, silent
from headrace.schemas.shards.manifest import Manifest, ShardRecord
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.schemas.shards.row_checks import problems_in_rows
from headrace.schemas.shards.shard_checks import schema_of
from headrace.schemas.shards.shard_format import MANIFEST_NAME
from headrace.schemas.shards.shard_rows import open_shard, read_row_group


def verify(directory: Path, progress: Progress = silent) -> list[str]:
    """List the problems of a shard directory, each beginning with a file's path; none if sound."""
    try:
        manifest = read_manifest(directory)
    except DataError as error:
        return [str(error)]
    problems = [*check_counts(directory, manifest), *check_other_files(directory, manifest)]
    sizes = [shard.bytes for shard in manifest.shards]
    pictures = Counter[str]()
    for shard in progress(manifest.shards, sizes, "verify"):
        problems += check_shard(directory / shard.file, shard, manifest, pictures)
    path = directory / MANIFEST_NAME
    return problems + [f"{path}: {problem}" for problem in check_pictures(manifest, pictures)]


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


def check_pictures(manifest: Manifest, found: Counter[str]) -> Iterator[str]:
    """The ledger of pictures against those in the shards, by split."""
    if manifest.images is None:
        return
    ledger = manifest.images.ledger
    if ledger.difference():
        yield f"the picture ledger is off by {ledger.difference()}"
    for split, pictures in ledger.pictures_out.items():
        if found[split] != pictures:
            yield f"the ledger has {pictures} {split} pictures, the shards {found[split]}"


def check_other_files(directory: Path, manifest: Manifest) -> Iterator[str]:
    """The tokenizer's copy, the saved config, the rejects, and no extra shards."""
    tokenizer = directory / TOKENIZER_NAME
    if not tokenizer.is_file():
        yield f"{tokenizer}: missing"
    elif file_sha256(tokenizer) != manifest.tokenizer.fingerprint:
        yield f"{tokenizer}: not the tokenizer of these shards (its SHA-256 differs)"
    if manifest.columns is None:
        yield from check_settings(directory / CONFIG_NAME, manifest)
        yield from check_rejects(directory / REJECTS_NAME, manifest)
    known = {shard.file for shard in manifest.shards}
    for path in parquet_files(directory):
        if path.relative_to(directory).as_posix() not in known:
            yield f"{path}: not in the manifest; remove it"


def parquet_files(directory: Path) -> list[Path]:
    """List the Parquet files in order of their names, hidden and temporary ones left out."""
    return [
        path
        for path in sorted(directory.rglob("*.parquet"))
        if not any(part[0] in "._" for part in path.relative_to(directory).parts)
    ]


def check_settings(path: Path, manifest: Manifest) -> Iterator[str]:
    """The saved config against the manifest's fingerprint."""
    try:
        settings = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        yield f"{path}: cannot be read ({error})"
        return
    if fingerprint(settings) != manifest.config_fingerprint:
        yield f"{path}: not the config of these shards (its fingerprint differs)"


def check_rejects(path: Path, manifest: Manifest) -> Iterator[str]:
    """Check that there are as many rejects as the sources count."""
    if not path.is_file():
        yield f"{path}: missing"
        return
    with path.open("rb") as lines:
        found = sum(1 for _ in lines)
    counted = sum(source.rejected_documents for source in manifest.sources)
    if found != counted:
        yield f"{path}: {found} lines, the sources count {counted} refused documents"


def check_shard(
    path: Path, shard: ShardRecord, manifest: Manifest, pictures: Counter[str]
) -> list[str]:
    """One Parquet file; its content is only read if its bytes are those that were written.

    Args:
        pictures: counts those of each split.
    """
    if not path.is_file():
        return [f"{path}: missing"]
    size = path.stat().st_size
    if size != shard.bytes:
        return [f"{path}: {size} bytes, {shard.bytes} were written"]
    if file_sha256(path) != shard.sha256:
        return [f"{path}: damaged (its SHA-256 differs)"]
    problems = []
    if shard.footer_crc32 is not None and with_checksums(path, shard) != shard:
        problems.append(f"{path}: the manifest has other checksums of its row groups")
    try:
        with open_shard(path, manifest, shard) as file:
            found = [
                f"{path}: {problem}" for problem in check_content(file, shard, manifest, pictures)
            ]
            return problems + found
    except (pa.ArrowException, OSError, ValueError) as error:
        return [*problems, f"{path}: {' '.join(str(error).split())}"]


def check_content(
    file: pq.ParquetFile, shard: ShardRecord, manifest: Manifest, pictures: Counter[str]
) -> Iterator[str]:
    """Row groups and rows of one shard, whose columns and sizes have been checked."""
    if manifest.columns is None:
        for name in sorted(set(file.schema_arrow.names) - set(schema_of(manifest).names)):
            yield f"column {name} is none of the shard format"
    totals = {"rows": 0, "tokens": 0, "trained_tokens": 0}
    last_key = -1
    for index, record in enumerate(shard.row_groups):
        rows = read_row_group(file, index, manifest, shard)
        where = f"row group {index}"
        found = describe_row_group(file.metadata.row_group(index), rows)
        if found != record.model_copy(update={"crc32": None}):
            yield f"{where}: {found}, the manifest has {record}"
        for problem in check_rows(rows, manifest, last_key):
            yield f"{where}: {problem}"
        last_key = int(rows["row_key"][-1].as_py())
        totals["rows"] += found.rows
        totals["tokens"] += found.tokens
        totals["trained_tokens"] += count_trained(rows)
        if manifest.images is not None:
            pictures[shard.split] += int(row_pictures(rows).sum())
    for name, total in totals.items():
        if total != getattr(shard, name):
            yield f"{total} {name}, the manifest has {getattr(shard, name)}"


def check_rows(rows: pa.Table, manifest: Manifest, last_key: int) -> Iterator[str]:
    """The rows of one row group; `last_key` is the key before them, -1 for none."""
    yield from problems_in_rows(rows, manifest)
    keys = rows["row_key"].to_numpy()
    ordered = np.all(keys[1:] >= keys[:-1]) and int(keys[0]) >= last_key
    if manifest.columns is None and not ordered:
        yield "row keys are not sorted"
    strangers = set(pc.unique(rows["source"]).to_pylist()) - {s.name for s in manifest.sources}
    if strangers:
        yield f"rows of sources that the manifest does not have: {sorted(map(str, strangers))}"
