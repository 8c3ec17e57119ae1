"""`manifest.json`: what a shard directory holds. Written last: without one it is not finished."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.named_files import PlainName, PlainText
from headrace.schemas.shards.foreign_columns import ForeignColumns
from headrace.schemas.shards.shard_format import SHARD_FORMAT, SHARD_FORMAT_VERSION
from headrace.schemas.shards.shard_kind import ShardKind

MAX_GROUP_ROWS = 1 << 24  # of one row group: it is read, and its rows are mixed, as a whole
MAX_GROUP_TOKENS = 1 << 27
MAX_ID = (1 << 31) - 1

Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
Checksum = Annotated[int, Field(strict=True, ge=0, lt=1 << 32)]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerRecord(Record):
    """Identity of the tokenizer that made the ids: SHA-256 of tokenizer.json and of its parsed
    content, size, special tokens by role.

    None stands for the content's in directories written before it was kept.
    """

    fingerprint: str
    content_fingerprint: str | None = None
    vocabulary_size: int = Field(strict=True, ge=1, le=MAX_ID + 1)
    special_tokens: dict[str, Annotated[int, Field(strict=True, ge=0, le=MAX_ID)]]

    def equals(self, other: "TokenizerRecord") -> bool:
        """Return whether two directories were made with one tokenizer."""
        if self.fingerprint == other.fingerprint:
            return True
        wanted = self.content_fingerprint
        return wanted is not None and other.content_fingerprint == wanted


class RowGroupRecord(Record):
    """One Parquet row group: its rows, where its bytes lie in the file, and their CRC-32.

    None stands in directories written before there were checksums.
    """

    rows: int = Field(strict=True, ge=0, le=MAX_GROUP_ROWS)
    tokens: int = Field(strict=True, ge=0, le=MAX_GROUP_TOKENS)
    byte_offset: Count
    bytes: Count
    crc32: Checksum | None = None


class ShardRecord(Record):
    """One Parquet file of one split. The footer is all that follows the last row group."""

    file: PlainName
    split: Literal["train", "evaluation"]
    rows: Count
    tokens: Count
    trained_tokens: Count
    bytes: Count
    sha256: str
    row_groups: list[RowGroupRecord]
    footer_crc32: Checksum | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ShardRecord":
        """Row groups add up to the file, and lie in it."""
        for name in ("rows", "tokens"):
            total = sum(getattr(group, name) for group in self.row_groups)
            if total != getattr(self, name):
                raise ValueError(f"{name} = {getattr(self, name)}, its row groups have {total}")
        if self.footer_offset > self.bytes:
            raise ValueError(f"row groups up to byte {self.footer_offset} of {self.bytes}")
        if any(group.rows > group.tokens for group in self.row_groups):
            raise ValueError("a row group with more rows than tokens")
        return self

    def rows_before(self, group: int) -> int:
        """Rows of the file that lie before a row group."""
        return sum(record.rows for record in self.row_groups[:group])

    @property
    def footer_offset(self) -> int:
        """Return the offset at which the row groups end and the footer begins; 0 without row
        groups.
        """
        return max((group.byte_offset + group.bytes for group in self.row_groups), default=0)


class SourceRecord(Record):
    """Counts of what one source contributed.

    Document lengths are in tokens, quantiles named p0 ... p100.

    A pair is one document; its tokens are those of both sides.

    `documents` were not refused; those of them that are in no row are also in `dropped_documents`,
    by reason. In a mixture of several sources, `mixed_tokens` are the tokens that the documents of
    each brought, before packing. `notes` count what was lost of the documents' texts, and the like.
    """

    name: PlainText
    documents: Count
    rejected_documents: Count
    dropped_documents: dict[str, Count] = {}
    rows: Count
    tokens: Count
    trained_tokens: Count
    document_length_quantiles: dict[str, Count]
    mixed_tokens: dict[str, Count] = {}
    notes: dict[PlainText, Count] = {}

    def fill(self, row_tokens: Count) -> float:
        """Share of its rows' `row_tokens` tokens that is used."""
        return self.tokens / (self.rows * row_tokens) if self.rows else 0.0


class TokenLedger(Record):
    """Every token the tokenizer gave is in a row of a split, or dropped for a named reason."""

    tokens_in: Count
    tokens_out: dict[str, Count]
    tokens_dropped: dict[str, Count]

    def difference(self) -> int:
        """Tokens unaccounted for; 0 in every sound directory."""
        return self.tokens_in - sum(self.tokens_out.values()) - sum(self.tokens_dropped.values())


class PictureLedger(Record):
    """Every picture of a document that was not refused is in a row of a split, or dropped for a
    named reason; those of refused documents are counted by what the documents were refused for.
    """

    pictures_in: Count = 0
    pictures_out: dict[str, Count] = {}
    pictures_dropped: dict[PlainText, Count] = {}

    def difference(self) -> int:
        """Pictures unaccounted for; 0 in every sound directory."""
        out, dropped = sum(self.pictures_out.values()), sum(self.pictures_dropped.values())
        return self.pictures_in - out - dropped


class ImagesRecord(Record):
    """The maker of tiles and placeholders: a vision family, and its processor's numbers.

    `placeholder_id` is the token that pictures fill. The fingerprint is over family and settings.
    """

    family: PlainName
    settings: dict[str, JsonValue]
    placeholder_id: int = Field(strict=True, ge=0, le=MAX_ID)
    fingerprint: str
    ledger: PictureLedger = PictureLedger()

    @model_validator(mode="after")
    def _consistent(self) -> "ImagesRecord":
        if self.fingerprint != settings_fingerprint(self.family, self.settings):
            raise ValueError("fingerprint is not that of family and settings")
        return self


def settings_fingerprint(family: str, settings: dict[str, JsonValue]) -> str:
    """Return the SHA-256 of a vision family and its settings."""
    return fingerprint([family, settings])


class Manifest(Record):
    """The whole of `manifest.json`, less its own checksum.

    `columns` stands where something else wrote the Parquet: what its columns mean. `images` stands
    where rows have pictures.
    """

    format: Literal["headrace-shards"] = SHARD_FORMAT
    format_version: int = SHARD_FORMAT_VERSION
    kind: ShardKind = "causal"
    tokenizer: TokenizerRecord
    sequence_len: int = Field(strict=True, ge=1, le=MAX_ID)
    packing: PlainText
    seed: int
    config_fingerprint: str
    inputs_fingerprint: str
    shards: list[ShardRecord]
    sources: list[SourceRecord]
    ledger: TokenLedger
    columns: ForeignColumns | None = None
    images: ImagesRecord | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        """Each file is there once, and rows hold no more tokens than fit into them."""
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("shards: a file is named twice")
        if self.images is not None and self.columns is not None:
            raise ValueError("images: foreign columns have none")
        for shard in self.shards:
            if shard.tokens > shard.rows * self.row_tokens:
                raise ValueError(
                    f"{shard.file}: {shard.tokens} tokens in {shard.rows} rows of {self.row_tokens}"
                )
        return self

    @property
    def row_tokens(self) -> int:
        """Tokens that fit into a row: a pair has two sides of `sequence_len`."""
        return self.sequence_len * (2 if self.kind == "preference" else 1)

    def identity(self) -> dict[str, object]:
        """Return the values by which a run knows its data again.

        Fields that came later count only where they are set, so that earlier runs resume; the
        tokenizer's content not at all, since the SHA-256 of its bytes counts.
        """
        values = self.model_dump(mode="json")
        values.get("tokenizer", {}).pop("content_fingerprint", None)
        if values.get("images") is None:
            values.pop("images", None)
        for source in values["sources"]:
            if not source["notes"]:
                del source["notes"]
        return values

    def split(self, name: str) -> list[ShardRecord]:
        """The shards of one split, in file order."""
        return [shard for shard in self.shards if shard.split == name]
