"""One `[[sources]]` table of `headrace prepare`'s config."""

from typing import Annotated, Literal

from pydantic import Field

from headrace.schemas.addresses import Address
from headrace.schemas.config_model import Config, IsNumber, Text
from headrace.schemas.prepare.axolotl_config import AxolotlConfig, kind_of_type, type_gives_answers
from headrace.schemas.prepare.chat_config import ChatConfig, PreferenceConfig, UnpairedConfig
from headrace.schemas.shards.shard_kind import ShardKind

Tokens = str | int | list[int]
Extract = Literal["html", "markdown", "pdf", "epub"]
WHOLE_FILES = ("pdf", "epub")  # that are no text, so that nothing cuts them
FileFormat = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"]
Delimiter = Annotated[str, Field(pattern=r"^[ -!#-~\t]$")]  # one byte, no quote or line end
DELIMITERS: dict[FileFormat, str] = {"csv": ",", "tsv": "\t"}
PLAIN = ("text", "documents", "preference", "unpaired")
OF_PLAIN_TEXTS = (
    "document_prefix",
    "document_suffix",
    "add_prefix_space",
    "parse_special_tokens",
)
KINDS: dict[str, ShardKind] = {"preference": "preference", "unpaired": "unpaired"}  # of types
READERS = {  # keys of a source that not every type reads
    "text_field": ("documents",),
    "document_separator": ("text",),
    "extract": ("text", "documents"),
    "extract_version": ("text", "documents"),
    "engine": ("axolotl",),
    "delimiter": ("documents", "chat", "preference", "unpaired", "axolotl"),
    "chat": ("chat", "preference", "unpaired"),
    "preference": ("preference",),
    "unpaired": ("unpaired",),
    **dict.fromkeys(OF_PLAIN_TEXTS, PLAIN),
}


class SourceConfig(Config):
    """One `[[sources]]` table: where documents come from."""

    name: Text = Field(
        description="Name of the source: appears in rows, ledger and per-source loss. Unique."
    )
    type: Literal[
        "text", "documents", "chat", "preference", "unpaired", "pretokenized", "axolotl"
    ] = Field(
        description='`"text"`: a file is a document, unless `document_separator` cuts it. '
        '`"documents"`: one document a record. `"chat"`: one conversation a record. '
        '`"preference"`: a better and a worse answer in each record. '
        '`"unpaired"`: an answer in each record, and whether it is a good one (KTO). '
        '`"pretokenized"`: `input_ids` in each record. '
        '`"axolotl"`: rows as Axolotl reads them; `path` may be its YAML file.'
    )
    path: Address | Annotated[list[Address], Field(min_length=1)] = Field(
        description="File or glob (`**` crosses folders), or a list of them, relative to the "
        "working directory. `.gz`, `.zst`, `.bz2` and `.xz` are read as they are."
    )
    exclude: list[Text] = Field(
        [], description='Leave out files whose path fits, for example `["*/tests/*"]`.'
    )
    text_field: Text = Field(
        "text",
        description="Field that holds the text (`documents` only); `meta.text` is a field in one, "
        "`parts.0` an entry of a list.",
    )
    format: FileFormat | None = Field(
        None,
        description="What is in the files. Default: by their names, as in `.jsonl.gz`; `.json` by "
        "its first character; others are JSONL.",
    )
    delimiter: Delimiter | None = Field(
        None,
        description='Character between the fields of CSV and TSV files, as `";"`. Default: comma '
        "or tab, or what else the first two rows agree on.",
    )
    document_separator: str | None = Field(
        None, description="Cut text files into documents at this string (`text` only)."
    )
    extract: Extract | None = Field(
        None,
        description="Take the text out of HTML, Markdown or (whole files) PDF and EPUB; needs the "
        "extra `documents`.",
    )
    extract_version: Text | None = Field(
        None,
        description="Library and version that take it out, as `prepare.json` has them; the run "
        "stops where another is installed.",
    )
    split: Literal["auto", "train", "evaluation"] = Field(
        "auto", description="Put all documents into one split; `auto`: by `evaluation_fraction`."
    )
    axolotl: AxolotlConfig | None = Field(None, description='For `type = "axolotl"`.')
    engine: Literal["headrace", "axolotl"] = Field(
        "headrace",
        description='Who tokenizes `type = "axolotl"`: `"axolotl"` calls an installed Axolotl, for '
        "types that Headrace does not know.",
    )
    document_prefix: Tokens | None = Field(
        None,
        description="What a text begins with instead of BOS: a string, a token id, a list of ids; "
        '`""` for nothing.',
    )
    document_suffix: Tokens | None = Field(
        None, description="What a text ends with instead of EOS, in the same forms."
    )
    add_prefix_space: bool = Field(
        False, description="Put a space before each text that does not begin with one."
    )
    parse_special_tokens: bool | None = Field(
        None, description="For the texts of this source. Default: the key of that name above."
    )
    mask_tokens: Literal[True] | list[int | str] = Field(
        [],
        description='Ids or texts of tokens that are never trained, as in `["<|im_start|>"]`; '
        "`true`: all that the tokenizer calls special, and EOS.",
    )
    control_class: Annotated[Literal[-1, 0, 1], IsNumber] | None = Field(
        None, description="Class of all its rows for control adapters."
    )
    sample_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Keep about this share of the documents, chosen by content; the rest is left "
        "out.",
    )
    max_rows: int | None = Field(
        None, ge=1, description="Keep so many rows, chosen at random; the rest is left out."
    )
    max_tokens: int | None = Field(
        None, ge=1, description="The same by tokens: as many whole rows as have no more."
    )
    chat: ChatConfig | None = Field(
        None, description='For `type = "chat"`, `"preference"` and `"unpaired"`.'
    )
    preference: PreferenceConfig | None = Field(None, description='For `type = "preference"`.')
    unpaired: UnpairedConfig | None = Field(None, description='For `type = "unpaired"`.')

    @property
    def separator(self) -> str | None:
        """Return the text that separates records in text files, or None."""
        return "\n" if self.type == "axolotl" else self.document_separator

    @property
    def kind(self) -> ShardKind:
        """Return the kind of its rows; a shard directory holds one kind."""
        if self.axolotl is not None:
            return kind_of_type(self.axolotl.rl, self.axolotl.type)
        return KINDS.get(self.type, "causal")

    @property
    def gives_answers(self) -> bool:
        """Return whether its documents are answers with what they answer."""
        return self.type == "chat" or (
            self.axolotl is not None and type_gives_answers(self.axolotl.rl, self.axolotl.type)
        )


def reads(source: SourceConfig, kind: FileFormat) -> bool:
    """Return whether sources of a type read files of a format; Axolotl's also lines of text."""
    return source.type == "axolotl" or (source.type == "text") == (kind == "text")


def check_keys(source: SourceConfig) -> None:
    """Refuse keys that only other types of sources read."""
    given = {key for key in READERS if getattr(source, key) != default_of(key)}
    for key, types in READERS.items():
        if key in given and source.type not in types:
            known = " or ".join(f'"{name}"' for name in types)
            raise ValueError(f'source "{source.name}": {key} is for type = {known}; remove it')
    if source.extract in WHOLE_FILES and (source.type != "text" or source.document_separator):
        raise ValueError(
            f'source "{source.name}": extract = "{source.extract}" is for whole files; '
            'set type = "text" without document_separator'
        )
    answers = source.preference or source.unpaired
    if answers is not None and answers.as_chat:
        for key in (key for key in OF_PLAIN_TEXTS if key in given):
            raise ValueError(
                f'source "{source.name}": {key} is for plain texts, and {source.type}.as_chat '
                "makes chats of them; remove one of the two"
            )


def default_of(key: str) -> object:
    """Return what a key of a source has where the config says nothing."""
    return SourceConfig.model_fields[key].default
