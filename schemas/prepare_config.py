"""The config of `headrace prepare`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from headrace.schemas.axolotl_config import AxolotlConfig
from headrace.schemas.axolotl_yaml import expand_axolotl
from headrace.schemas.chat_config import ChatConfig
from headrace.schemas.toml_config import Config, Text

Packing = Literal["concatenate", "best_fit", "none"]
Overlong = Literal["split", "truncate", "drop"]


class SourceConfig(Config):
    """One `[[sources]]` table: where documents come from."""

    name: Text = Field(
        description="Name of the source: appears in rows, ledger and per-source loss. Unique."
    )
    type: Literal["text", "documents", "chat", "axolotl"] = Field(
        description='`"text"`: a file is a document, unless `document_separator` cuts it. '
        '`"documents"`: one document a record. `"chat"`: one conversation a record. '
        '`"axolotl"`: rows as Axolotl reads them; `path` may be its YAML file.'
    )
    path: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        description="File or glob (`**` crosses folders), or a list of them, relative to the "
        "working directory. `.gz` and `.zst` are read as they are."
    )
    exclude: list[Text] = Field(
        [], description='Leave out files whose path fits, for example `["*/tests/*"]`.'
    )
    text_field: Text = Field("text", description="Field that holds the text (`documents` only).")
    document_separator: str | None = Field(
        None, description="Cut text files into documents at this string (`text` only)."
    )
    split: Literal["auto", "train", "evaluation"] = Field(
        "auto", description="Put all documents into one split; `auto`: by `evaluation_fraction`."
    )
    axolotl: AxolotlConfig | None = Field(None, description='For `type = "axolotl"`.')
    engine: Literal["headrace", "axolotl"] = Field(
        "headrace",
        description='Who tokenises `type = "axolotl"`: `"axolotl"` calls an installed Axolotl, for '
        "types that Headrace does not know.",
    )
    chat: ChatConfig | None = Field(None, description='For `type = "chat"`.')


class PrepareConfig(Config):
    """Top-level keys."""

    output: Text = Field(description="Shard directory to write.")
    tokenizer: Text = Field(
        description="Directory with `tokenizer.json` (a model directory will do)."
    )
    sequence_len: int = Field(1024, ge=8, le=1 << 20, description="Tokens in one training row.")
    packing: Packing = Field(
        "concatenate",
        description='`"concatenate"`: documents follow each other and are cut at `sequence_len`. '
        '`"best_fit"`: rows hold whole documents, chosen to fill them. `"none"`: each document is '
        "a row. Attention always stops at document ends.",
    )
    overlong: Overlong | None = Field(
        None,
        description="Documents longer than `sequence_len`, where `packing` keeps documents whole. "
        '`"split"`: cut into pieces that are packed as documents of their own. `"truncate"`: cut '
        'off what is too much. `"drop"`: leave them out. Default: `"split"`, which loses nothing.',
    )
    shards: int = Field(8, ge=1, le=99_999, description="Number of train shards.")
    seed: int = Field(0, ge=0, description="Decides shuffle and evaluation split.")
    evaluation_fraction: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="Share of documents kept for evaluation, chosen by content before packing.",
    )
    bos: Literal["auto", "always", "never"] = Field(
        "auto", description='BOS at document start: `"auto"` does what the tokenizer itself does.'
    )
    eos: Literal["auto", "never"] = Field(
        "auto", description='EOS at document end: `"auto"` appends it where it is not there yet.'
    )
    special_tokens: dict[str, str] = Field(
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
    sources: list[SourceConfig] = Field(min_length=1, description="The inputs, one table each.")

    @model_validator(mode="before")
    @classmethod
    def resolve_overlong(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = expand_axolotl(values)
        if values.get("overlong") is not None:
            return values
        whole = values.get("packing", "concatenate") != "concatenate"
        return values | {"overlong": "split" if whole else None}

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
    def check_sources(self) -> "PrepareConfig":
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'two sources are named "{name}"; give each its own name')
        for source in self.sources:
            if source.type != "text" and source.document_separator is not None:
                raise ValueError(
                    f'source "{source.name}": document_separator is for type = "text"; remove it'
                )
            if source.type != "chat" and source.chat is not None:
                raise ValueError(f'source "{source.name}": chat is for type = "chat"; remove it')
            if (source.type == "axolotl") != (source.axolotl is not None):
                raise ValueError(
                    f'source "{source.name}": type = "axolotl" and [sources.axolotl] need each '
                    "other, unless path is an Axolotl YAML file"
                )
            if source.document_separator == "":
                raise ValueError(
                    f'source "{source.name}": document_separator is empty; leave it out'
                )
        return self
