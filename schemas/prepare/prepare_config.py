"""The config of `headrace prepare`."""

from typing import Any, Literal, cast

from pydantic import Field, model_validator

from headrace.schemas.config_model import Config, Text
from headrace.schemas.prepare.axolotl_config import kind_of_type, type_gives_answers
from headrace.schemas.prepare.axolotl_yaml import expand_axolotl
from headrace.schemas.prepare.filter_config import (
    DecontaminateConfig,
    DeduplicateConfig,
    FiltersConfig,
)
from headrace.schemas.prepare.images_config import ImagesConfig
from headrace.schemas.prepare.source_config import KINDS, SourceConfig, Tokens, check_keys, reads
from headrace.schemas.shards.shard_kind import ShardKind

Packing = Literal["concatenate", "best_fit", "none"]
Overlong = Literal["split", "truncate", "drop"]
TokenizerBackend = Literal["auto", "tokenizers", "fastokens"]
SpecialToken = Literal[
    "bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"
]
ONE_A_ROW: dict[ShardKind, str] = {"preference": "a pair", "unpaired": "an answer"}
MIXED = "mixed"  # the source of rows that hold documents of several


class PrepareConfig(Config):
    """Top-level keys."""

    output: Text = Field(description="Shard directory to write.")
    tokenizer: Text = Field(
        description="Directory with `tokenizer.json` (a model directory will do)."
    )
    tokenizer_backend: TokenizerBackend = Field(
        "auto",
        description='`"fastokens"` is many times faster. Its ids are compared with those of '
        "`tokenizers` on a sample of every block, and any difference stops the run, so that the "
        'choice changes nothing in the output. `"auto"` takes it where it is installed and gives '
        "the ids of hard texts.",
    )
    sequence_len: int = Field(1024, ge=8, le=1 << 20, description="Tokens in one training row.")
    packing: Packing = Field(
        cast("Packing", None),  # resolved from the sources before it is checked
        description='`"concatenate"`: documents follow each other and are cut at `sequence_len`. '
        '`"best_fit"`: rows hold whole documents, chosen to fill them. `"none"`: each document is '
        "a row. Attention always stops at document ends. Default: "
        '`"concatenate"`; with a source of chats, or of prompts and answers of Axolotl, '
        '`"best_fit"`, which cuts no answer from its question; for pairs `"none"`.',
    )
    overlong: Overlong | None = Field(
        None,
        description="Documents longer than `sequence_len`, where `packing` keeps documents whole. "
        '`"split"`: cut into pieces that are packed as documents of their own. `"truncate"`: cut '
        'off what is too much. `"drop"`: leave them out. Default: `"split"`, which loses nothing; '
        'for pairs, which cannot be split, `"truncate"`; for chats `"drop"`.',
    )
    sequence_prefix: Tokens = Field(
        "",
        description="What each row begins with, before its first document: a string, a token id, "
        "a list of ids.",
    )
    drop_tails: bool = Field(
        False,
        description='Drop the last row of a block where it is not full (`"concatenate"` only).',
    )
    shards: int = Field(8, ge=1, le=99_999, description="Number of train shards.")
    mix_sources: bool = Field(
        False,
        description="Put documents of different sources into one row. All rows then have the "
        f'source `"{MIXED}"`.',
    )
    max_rows: int | None = Field(
        None,
        ge=1,
        description="Keep so many rows of all sources together, chosen at random after the limits "
        "of each source.",
    )
    max_tokens: int | None = Field(
        None, ge=1, description="The same by tokens: as many whole rows as have no more."
    )
    seed: int = Field(0, ge=0, description="Decides shuffle and evaluation split.")
    evaluation_fraction: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="Share of documents kept for evaluation, chosen by content before packing.",
    )
    evaluation_documents: int | None = Field(
        None,
        ge=1,
        description="About so many documents for evaluation, as near as chance has it, instead of "
        "a share: the inputs are counted first.",
    )
    bos: Literal["auto", "always", "never"] = Field(
        "auto", description='BOS at document start: `"auto"` does what the tokenizer itself does.'
    )
    eos: Literal["auto", "never"] = Field(
        "auto", description='EOS at document end: `"auto"` appends it where it is not there yet.'
    )
    special_tokens: dict[SpecialToken, str] = Field(
        {}, description='Other special tokens than the tokenizer names, as `{eos_token = "</s>"}`.'
    )
    added_tokens: list[str] = Field(
        [],
        description="Tokens that the tokenizer gets where it has none of that text. The model must "
        "get the same: its `tokenizer.json` is the one in the shard directory.",
    )
    parse_special_tokens: bool = Field(
        False,
        description="Whether `<|...|>` in a document becomes the special token, or stays text.",
    )
    max_reject_fraction: float = Field(
        0.001, ge=0, le=1, description="Stop when more than this share of the documents is refused."
    )
    max_record_bytes: int = Field(
        1 << 26,
        ge=1 << 10,
        description="Refuse larger records. A text of more than 1 MiB is tokenized in pieces.",
    )
    block_bytes: int = Field(
        4 << 20,
        ge=1 << 10,
        description="Input bytes in one block, the unit of work. Changes rows at block ends.",
    )
    row_group_tokens: int = Field(
        1 << 20,
        ge=1,
        description="Tokens in one Parquet row group: what the trainer reads at once.",
    )
    filters: FiltersConfig = Field(
        default_factory=FiltersConfig, description="Documents to leave out."
    )
    deduplicate: DeduplicateConfig = Field(
        default_factory=DeduplicateConfig, description="Documents that repeat an earlier one."
    )
    decontaminate: DecontaminateConfig | None = Field(
        None, description="Documents that share text with evaluation sets."
    )
    images: ImagesConfig | None = Field(
        None, description="Pictures in chats and pairs, for a vision-language model."
    )
    sources: list[SourceConfig] = Field(min_length=1, description="The inputs, one table each.")

    @property
    def kind(self) -> ShardKind:
        """Return the kind of row that all sources give."""
        return self.sources[0].kind

    @model_validator(mode="before")
    @classmethod
    def resolve_packing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = expand_axolotl(values)
        pairs = kind_of_sources(values.get("sources")) != "causal"
        chats = count_chats(values.get("sources"))
        packing = values.get("packing")
        if packing is None:
            packing = "none" if pairs else "best_fit" if chats else "concatenate"
        overlong = values.get("overlong")
        if overlong is None and packing != "concatenate":
            whole = "drop" if chats == len(values["sources"]) else None
            overlong = "truncate" if pairs else whole if chats else "split"
        return values | {"packing": packing, "overlong": overlong}

    def overlong_of(self, source: SourceConfig) -> Overlong | None:
        """Return what becomes of a source's documents that are longer than a row.

        None where packing cuts every document. Chats lose no question unless the config says so.
        """
        if self.overlong is not None or self.packing == "concatenate":
            return self.overlong
        return "drop" if source.gives_answers else "split"

    @model_validator(mode="after")
    def check_overlong(self) -> "PrepareConfig":
        if self.packing == "concatenate" and self.overlong is not None:
            raise ValueError(
                f'overlong = "{self.overlong}" has no meaning with packing = "concatenate", which '
                "cuts every document at row ends and loses nothing; remove it, or set packing to "
                '"best_fit" or "none"'
            )
        return self

    @model_validator(mode="after")
    def check_kind(self) -> "PrepareConfig":
        for source in self.sources:
            if source.kind != self.kind:
                raise ValueError(
                    f'source "{source.name}" gives {source.kind} rows, "{self.sources[0].name}" '
                    f"{self.kind} ones; prepare each kind into a directory of its own"
                )
        if self.kind != "causal" and self.packing != "none":
            raise ValueError(
                f'packing = "{self.packing}": {ONE_A_ROW[self.kind]} is a row of its own; remove '
                'it, or set "none"'
            )
        if self.kind != "causal" and self.sequence_prefix != "":
            raise ValueError(f"sequence_prefix: {self.kind} rows are not packed; remove it")
        if self.drop_tails and self.packing != "concatenate":
            raise ValueError(
                'drop_tails: only packing = "concatenate" cuts rows at their length; remove it'
            )
        if self.kind != "causal" and self.overlong == "split":
            raise ValueError(
                f'overlong = "split": {self.kind} rows cannot be split; set "truncate" or "drop"'
            )
        return self

    @model_validator(mode="after")
    def check_images(self) -> "PrepareConfig":
        if self.images is None:
            return self
        if self.packing == "concatenate":
            raise ValueError(
                'images: packing = "concatenate" would cut documents from their pictures; set '
                '"best_fit" or "none"'
            )
        if self.mix_sources:
            raise ValueError("images: mix_sources is not supported with pictures; remove it")
        for source in self.sources:
            if source.engine == "axolotl":
                raise ValueError(
                    f'source "{source.name}": engine = "axolotl" reads no pictures; drop it, or '
                    "prepare it without [images]"
                )
        return self

    @model_validator(mode="after")
    def check_evaluation(self) -> "PrepareConfig":
        default = PrepareConfig.model_fields["evaluation_fraction"].default
        if self.evaluation_documents is not None and self.evaluation_fraction != default:
            raise ValueError("evaluation_documents and evaluation_fraction exclude each other")
        return self

    @model_validator(mode="after")
    def check_mixing(self) -> "PrepareConfig":
        if not self.mix_sources:
            return self
        if self.overlong is None and self.packing == "best_fit":
            raise ValueError(
                'mix_sources: chats and texts share rows, so overlong is for both; set "drop", '
                '"truncate" or "split"'
            )
        if self.packing == "none":
            raise ValueError(
                'mix_sources: with packing = "none" each row is one document; remove it, or set '
                'packing to "concatenate" or "best_fit"'
            )
        if len({source.control_class for source in self.sources}) > 1:
            raise ValueError(
                "mix_sources: a row has one control_class, and the sources have several; remove it"
            )
        for source in self.sources:
            if source.max_rows is not None or source.max_tokens is not None:
                raise ValueError(
                    f'source "{source.name}": limits take whole rows, which mix_sources fills '
                    "from all sources; set max_rows and max_tokens for all sources together, or "
                    'prepare it alone with its limit and packing = "none", and mix those shards '
                    'as a source of type = "pretokenized"'
                )
        return self

    @model_validator(mode="after")
    def check_sources(self) -> "PrepareConfig":
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'two sources are named "{name}"; give each its own name')
        for source in self.sources:
            if (source.type == "axolotl") != (source.axolotl is not None):
                raise ValueError(
                    f'source "{source.name}": type = "axolotl" and [sources.axolotl] need each '
                    "other, unless path is an Axolotl YAML file"
                )
            check_keys(source)
            if self.decontaminate is not None and source.type == "pretokenized":
                raise ValueError(
                    f'source "{source.name}": rows of ids have no text that decontaminate could '
                    "look at; prepare it without, or from its texts"
                )
            if source.format is not None and not reads(source, source.format):
                raise ValueError(
                    f'source "{source.name}": type = "{source.type}" does not read '
                    f'format = "{source.format}"; remove the format, or correct the type'
                )
            if source.document_separator == "":
                raise ValueError(
                    f'source "{source.name}": document_separator is empty; leave it out'
                )
        return self


def count_chats(sources: Any) -> int:
    """Return how many of some unchecked sources give questions with their answers."""
    tables = sources if isinstance(sources, list) else []
    return sum(1 for table in tables if isinstance(table, dict) and is_chat(table))


def is_chat(table: dict[str, Any]) -> bool:
    """Return whether an unchecked source gives questions with their answers."""
    options = table.get("axolotl")
    if not isinstance(options, dict):
        return table.get("type") == "chat"
    return type_gives_answers(options.get("rl"), options.get("type"))


def kind_of_sources(sources: Any) -> ShardKind:
    """Return the kind of rows that the first of some unchecked sources gives."""
    first = sources[0] if isinstance(sources, list) and sources else None
    if not isinstance(first, dict):
        return "causal"
    options = first.get("axolotl")
    if isinstance(options, dict):
        return kind_of_type(options.get("rl"), options.get("type"))
    return KINDS.get(str(first.get("type")), "causal")
