"""`manifest.json`: what a shard directory holds. Written last: without one it is not finished."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.foreign_columns import ForeignColumns
from headrace.schemas.publish import write_atomic
from headrace.schemas.shard_format import MANIFEST_NAME, SHARD_FORMAT, SHARD_FORMAT_VERSION


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerRecord(Record):
    """Which tokenizer made the ids: SHA-256 of tokenizer.json, size, special tokens by role."""

    fingerprint: str
    vocabulary_size: int
    special_tokens: dict[str, int]


class RowGroupRecord(Record):
    """One Parquet row group: its rows, where its bytes lie in the file, and their CRC-32.

    None stands in directories written before there were checksums.
    """

    rows: int
    tokens: int
    byte_offset: int
    bytes: int
    crc32: int | None = None


class ShardRecord(Record):
    """One Parquet file of one split. The footer is all that follows the last row group."""

    file: str
    split: Literal["train", "evaluation"]
    rows: int
    tokens: int
    trained_tokens: int
    bytes: int
    sha256: str
    row_groups: list[RowGroupRecord]
    footer_crc32: int | None = None

    def rows_before(self, group: int) -> int:
        """Rows of the file that lie before a row group."""
        return sum(record.rows for record in self.row_groups[:group])

    @property
    def footer_offset(self) -> int:
        """Where the row groups end and the footer begins; 0 in a file without row groups."""
        return max((group.byte_offset + group.bytes for group in self.row_groups), default=0)


class SourceRecord(Record):
    """What one source brought. Document lengths are in tokens, quantiles named p0 ... p100.

    A pair is one document; its tokens are those of both sides.

    `documents` were not refused; those of them that are in no row are also in `dropped_documents`,
    by reason. In a mixture of several sources, `mixed_tokens` are the tokens that the documents of
    each brought, before packing. `notes` count what was lost of the documents' texts, and the like.
    """

    name: str
    documents: int
    rejected_documents: int
    dropped_documents: dict[str, int] = {}
    rows: int
    tokens: int
    trained_tokens: int
    document_length_quantiles: dict[str, int]
    mixed_tokens: dict[str, int] = {}
    notes: dict[str, int] = {}

    def fill(self, row_tokens: int) -> float:
        """Share of its rows' `row_tokens` tokens that is used."""
        return self.tokens / (self.rows * row_tokens) if self.rows else 0.0


class TokenLedger(Record):
    """Every token the tokenizer gave is in a row of a split, or dropped for a named reason."""

    tokens_in: int
    tokens_out: dict[str, int]
    tokens_dropped: dict[str, int]

    def difference(self) -> int:
        """Tokens unaccounted for; 0 in every sound directory."""
        return self.tokens_in - sum(self.tokens_out.values()) - sum(self.tokens_dropped.values())


class Manifest(Record):
    """The whole of `manifest.json`, less its own checksum.

    `columns` stands where something else wrote the Parquet: what its columns mean.
    """

    format: Literal["headrace-shards"] = SHARD_FORMAT
    format_version: int = SHARD_FORMAT_VERSION
    kind: Literal["causal", "preference"] = "causal"
    tokenizer: TokenizerRecord
    sequence_len: int
    packing: str
    seed: int
    config_fingerprint: str
    inputs_fingerprint: str
    shards: list[ShardRecord]
    sources: list[SourceRecord]
    ledger: TokenLedger
    columns: ForeignColumns | None = None

    @property
    def row_tokens(self) -> int:
        """Tokens that fit into a row: a pair has two sides of `sequence_len`."""
        return self.sequence_len * (2 if self.kind == "preference" else 1)

    def split(self, name: str) -> list[ShardRecord]:
        """The shards of one split, in file order."""
        return [shard for shard in self.shards if shard.split == name]


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Publish the manifest with a checksum over its own content. Call it last."""
    body = manifest.model_dump(mode="json")
    body["manifest_sha256"] = fingerprint(body)
    write_atomic(directory / MANIFEST_NAME, json.dumps(body, indent=1, ensure_ascii=False) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        DataError: missing, not JSON, edited by hand, of another version, or with unknown fields.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise missing_manifest(path)
    return parse_manifest(path.read_bytes(), path)


def missing_manifest(path: Path | str) -> DataError:
    """What to say of a directory without a manifest."""
    return DataError(f"{path}: not found; run `headrace prepare` to the end, or correct the path")


def parse_manifest(content: bytes, path: Path | str) -> Manifest:
    """The manifest in a file's bytes; `path` is for messages. Raises as `read_manifest`."""
    try:
        body = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); prepare the directory again") from None
    if not isinstance(body, dict) or body.get("format") != SHARD_FORMAT:
        raise DataError(f'{path}: not a shard manifest (no "format": "{SHARD_FORMAT}")')
    if body.get("format_version") != SHARD_FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {body.get('format_version')}, "
            f"this release reads {SHARD_FORMAT_VERSION}"
        )
    checksum = body.pop("manifest_sha256", None)
    if checksum != fingerprint(body):
        raise DataError(
            f"{path}: edited or damaged (its checksum differs); prepare the directory again"
        )
    try:
        return Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {where}: {first['msg']}") from None
