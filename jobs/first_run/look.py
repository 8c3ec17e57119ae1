"""Kinds of rows in files, told by names and first records."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from headrace.dataprep.formats.extraction import library_version
from headrace.dataprep.images.references import MARKER
from headrace.dataprep.input.files import describe_file
from headrace.dataprep.input.readers import read_records
from headrace.dataprep.input.records import Record
from headrace.dataprep.input.streams import compression
from headrace.dataprep.input.tasks import cut_file
from headrace.dataprep.text.conversation import FIELDS
from headrace.schemas.errors import ConfigError, DataError, install_hint
from headrace.schemas.prepare.source_config import Extract, SourceConfig

RECORDS_LOOKED_AT = 32
LARGEST_RECORD = 1 << 24
MOST_FILES = 100_000
TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .mdx .rst .org .tex .py .js .ts .tsx .jsx .java .c .h .cc .cpp .hpp "
    ".cs .go .rs .rb .php .swift .kt .scala .lua .r .jl .sql .sh .xml .yaml .yml "
    ".toml .ini .cfg .srt .vtt .log".split()
)
EXTRACTED: dict[str, Extract] = {
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".epub": "epub",
}
RECORD_SUFFIXES = frozenset(
    ".jsonl .ndjson .json .csv .tsv .parquet .pq .arrow .ipc .feather".split()
)
PICTURES = frozenset(".png .jpg .jpeg .webp .gif .bmp .tif .tiff".split())
EXCHANGES = (  # fields of a question and its answer
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)
TEXT_FIELDS = ("text", "content", "body", "document", "article", "story", "code")
PICTURE_FIELDS = ("image", "images", "image_url", "pixel_values")


@dataclass(frozen=True)
class Kind:
    """The type of a source, and the keys that its rows need.

    `problem` says why rows of this kind cannot be used, where that is so; `pictures` whether they
    have some.
    """

    type: str
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    seen: str = ""
    problem: str = ""
    pictures: bool = False


@dataclass
class Found:
    """Files of one kind, from one of the paths that were named."""

    kind: Kind
    root: Path
    files: list[Path]

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    def patterns(self) -> list[str]:
        """Return what names the files in a config: themselves, or a glob for each ending."""
        if self.root.is_file():
            return [str(self.root)]
        suffixes = sorted({"".join(endings(path)) for path in self.files})
        return [f"{glob.escape(str(self.root))}/**/*{suffix}" for suffix in suffixes]


@dataclass(frozen=True)
class Abilities:
    """Kinds of rows that a model can be trained on: chats with its template, and pictures."""

    chats: bool
    pictures: bool = False


def look(paths: Sequence[Path], abilities: Abilities) -> list[Found]:
    """Sort files by what is in them; hidden ones are passed over.

    Raises:
        DataError: a path is not there, or holds no file.
    """
    found: dict[tuple[Path, str, str], Found] = {}
    for root in paths:
        files = list(files_of(root))
        if not files:
            raise DataError(f"{root}: no files; name a file, or a folder with files in it")
        for path in files:
            kind = kind_of(path, abilities)
            key = (root, endings(path)[0] if kind.problem else "", repr(kind))
            found.setdefault(key, Found(kind, root, [])).files.append(path)
    return sorted(
        found.values(), key=lambda item: (bool(item.kind.problem), -item.size, str(item.root))
    )


def files_of(root: Path) -> Iterator[Path]:
    """Yield a file, or the files below a folder in a fixed order.

    Raises:
        DataError: nothing is there, or more files than can be looked at.
    """
    if not root.exists():
        raise DataError(f"{root}: no such file or folder; correct the path")
    if root.is_file():
        yield root
        return
    count = 0
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            count += 1
            if count > MOST_FILES:
                raise DataError(f"{root}: more than {MOST_FILES:,} files; name narrower folders")
            yield Path(folder, name)


def endings(path: Path) -> list[str]:
    """Return the ending that tells what is in a file, and that of its compression, if any."""
    if compression(str(path)) is None:
        return [path.suffix.lower(), ""]
    return [Path(path.stem).suffix.lower(), path.suffix]


def kind_of(path: Path, abilities: Abilities) -> Kind:
    """Return the kind of a file's rows."""
    suffix = endings(path)[0]
    if suffix in TEXT_SUFFIXES:
        return Kind("text", seen="plain text, a file is a document")
    if suffix in EXTRACTED:
        return extracted_kind(EXTRACTED[suffix])
    if suffix in PICTURES:
        return Kind("", problem="a picture by itself; rows name pictures and say what is in them")
    if suffix not in RECORD_SUFFIXES:
        return Kind("", problem="unknown ending; write text as .txt and records as .jsonl")
    try:
        records = first_records(path)
    except DataError as error:
        return Kind("", problem=str(error))
    if not records:
        return Kind("", problem=f"{path}: no record could be read")
    return kind_of_records(records, abilities)


def extracted_kind(extract: Extract) -> Kind:
    """Return the kind of files whose text a library takes out, if it is there."""
    try:
        source = SourceConfig(name="look", type="text", path="-", extract=extract)
        library = library_version(source)
    except ConfigError:
        hint = install_hint("documents")
        return Kind("", problem=f"the text of {extract} needs another library; {hint}")
    seen = f"text that {library} takes out of {extract}, a file is a document"
    return Kind("text", {"extract": extract}, seen)


def first_records(path: Path) -> list[Record]:
    """Return a file's first records that can be read.

    Raises:
        DataError: the file cannot be read at all.
    """
    source = SourceConfig(name="look", type="chat", path=str(path))
    pieces = cut_file(source, describe_file("look", str(path)), None, 1 << 20)
    read = (item for piece in pieces for item in read_records(source, piece, None, LARGEST_RECORD))
    return [item for item in islice(read, RECORDS_LOOKED_AT) if isinstance(item, Record)]


def kind_of_records(records: Sequence[Record], abilities: Abilities) -> Kind:
    """Return the kind of rows with these fields."""
    rows = [record.fields for record in records]
    pictures = any(map(has_pictures, rows))
    if pictures and not abilities.pictures:
        return Kind("", problem="rows with pictures, which the model has no processor for")
    kind = kind_of_rows(rows, abilities.chats)
    if not pictures or kind.problem:
        return kind
    if kind.type not in ("chat", "preference"):
        return Kind("", problem="rows with pictures that are neither conversations nor pairs")
    return replace(kind, seen=f"{kind.seen}, with pictures", pictures=True)


def has_pictures(value: Any) -> bool:
    """Return whether a row has a field of pictures, or a part of a message is one."""
    if isinstance(value, Mapping):
        named = any(value.get(name) not in (None, "", []) for name in PICTURE_FIELDS)
        return named or any(map(has_pictures, value.values()))
    if not isinstance(value, list):
        return False
    texts = len(value) > 1 and all(isinstance(item, str) for item in value)
    return (texts and MARKER in value[0]) or any(map(has_pictures, value))


def kind_of_rows(rows: Sequence[dict[str, Any]], chats: bool) -> Kind:
    """Return the kind of rows with these fields; the first rule that fits decides."""
    names = {name for row in rows for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= names:
        return preference_kind(rows, names, chats)
    if chat := next((name for name in FIELDS if name in names), None):
        if not chats:
            return Kind("", problem="conversations, and the tokenizer has no chat template")
        settings = {} if chat == "messages" else {"chat": {"field": chat}}
        return Kind("chat", settings, f"conversations in `{chat}`")
    if "input_ids" in names:
        return Kind("pretokenized", seen="token ids in `input_ids`")
    if pair := next((pair for pair in EXCHANGES if names.issuperset(pair)), None):
        return exchange_kind(rows, names, pair, chats)
    return text_kind(rows)


def preference_kind(rows: Sequence[dict[str, Any]], names: set[str], chats: bool) -> Kind:
    """Return the kind of rows with a better and a worse answer."""
    texts = all(isinstance(row.get("chosen"), str) for row in rows)
    fields: dict[str, Any] = {}
    if "prompt" not in names:
        prompt = next((name for name in ("question", "instruction", "input") if name in names), "")
        if not prompt and texts:
            return Kind("", problem="pairs without a field `prompt`; rename the field")
        fields |= {"prompt": prompt} if prompt else {}
    if texts and chats:
        fields["as_chat"] = True
    settings = {"preference": fields} if fields else {}
    return Kind("preference", settings, "pairs of a chosen and a rejected answer")


def exchange_kind(
    rows: Sequence[dict[str, Any]], names: set[str], pair: tuple[str, str], chats: bool
) -> Kind:
    """Return the kind of rows that hold a question and its answer."""
    prompt, completion = pair
    seen = f"questions in `{prompt}` and answers in `{completion}`"
    alpaca = pair[0] == "instruction" and any(row.get("input") for row in rows)
    if alpaca and not chats:
        return Kind("axolotl", {"axolotl": {"type": "alpaca"}}, f"{seen}, with `input` (Alpaca)")
    if not chats:
        table = {
            "field_instruction": prompt,
            "field_output": completion,
            "format": "{instruction}\n",
        }
        table |= {"no_input_format": "{instruction}\n"}
        return Kind("axolotl", {"axolotl": {"type": table}}, f"{seen}; no chat template is there")
    fields = {"prompt": prompt, "completion": completion}
    changed = {key: value for key, value in fields.items() if value != key}
    if alpaca:
        changed["prompt_input"], seen = "input", f"{seen}, with `input`"
    return Kind("chat", {"chat": changed} if changed else {}, seen)


def text_kind(rows: Sequence[dict[str, Any]]) -> Kind:
    """Return the kind of rows that are documents: their text is in the longest field of texts."""
    lengths: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str):
                lengths[name] = lengths.get(name, 0) + len(value)
    if not lengths:
        return Kind("", problem="records without a field of text")
    known = [name for name in TEXT_FIELDS if name in lengths]
    name = known[0] if known else max(lengths, key=lambda name: lengths[name])
    settings = {} if name == "text" else {"text_field": name}
    return Kind("documents", settings, f"documents in `{name}`")
