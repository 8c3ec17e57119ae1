"""SentencePiece and tiktoken files to `tokenizer.json`, by transformers' own converters."""

import base64
import binascii
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from headrace.dataprep.text.fast_tokenizer import HARD_TEXTS
from headrace.dataprep.text.tokenizer import CONFIG_NAMES, TOKENIZER_NAME, read_json
from headrace.schemas.errors import ConfigError, DataError, install_hint
from headrace.schemas.outside_text import read_bytes
from headrace.schemas.publish import write_atomic

SENTENCEPIECE_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
PLAIN_TEXTS = (
    "The water of the river turns the wheel of the mill.",
    "x = [1, 2, 3]",
    "1234 stones, 56 wheels; a mill-race",
)
LIBRARIES = ("transformers", "sentencepiece", "google.protobuf", "tiktoken")


class Converted(NamedTuple):
    """A tokenizer, and what its own library makes of a text, without special tokens."""

    tokenizer: Tokenizer
    reference: Callable[[str], list[int]]
    library: str


def convert_tokenizer(folder: Path, pattern: str | None = None) -> str:
    """Write the `tokenizer.json` of a model directory; return a line on how it was compared.

    Args:
        pattern: the expression that cuts texts into words, for tiktoken's files, which do not
            hold it. Default: transformers', that of GPT-4 and Llama 3.

    Raises:
        ConfigError: there is one already, no file of the other kinds, or a library is missing.
        DataError: the file cannot be read, or the converter gives other ids than its library.
    """
    target = folder / TOKENIZER_NAME
    if target.exists():
        raise ConfigError(f"{target}: is there already; remove it to write it anew")
    path = find_source(folder)
    if path is None:
        raise ConfigError(f"{folder}: no {', '.join(SENTENCEPIECE_NAMES)} or *.tiktoken in it")
    if missing := [name for name in LIBRARIES if not is_there(name)]:
        raise ConfigError(f"{path}: needs {missing[0]}; {install_hint('convert')}")
    ranks = read_ranks(path)
    if ranks is None:
        found = convert_pieces(folder, path)
    else:
        found = convert_ranks(path, ranks, folder, pattern)
    equal = compare(found, path, exact=ranks is not None)
    write_atomic(target, found.tokenizer.to_str(pretty=True))
    return f"{target}: written; {equal} of {len(texts())} hard texts have {found.library}'s ids"


def is_there(name: str) -> bool:
    """Return whether a module can be imported."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def find_source(folder: Path) -> Path | None:
    """Return the file of a directory that holds its tokenizer in another form, or None."""
    names = [folder / name for name in SENTENCEPIECE_NAMES]
    found = [path for path in (*names, *sorted(folder.glob("*.tiktoken"))) if path.is_file()]
    return found[0] if found else None


def read_ranks(path: Path) -> dict[bytes, int] | None:
    """Return the tokens of tiktoken's file with their ids, or None where it is none."""
    ranks: dict[bytes, int] = {}
    for line in read_bytes(path).splitlines():
        token, _, number = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(number)
        except (binascii.Error, ValueError):
            return None
    return ranks or None


def convert_pieces(folder: Path, path: Path) -> Converted:
    """Convert a model of SentencePiece as transformers does when it opens the directory."""
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    try:
        model = SentencePieceProcessor(model_file=str(path))
        opened: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        content = opened.backend_tokenizer.to_str()
    except Exception as error:  # noqa: BLE001  each converter raises its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: transformers cannot convert it ({reason})") from None
    return Converted(Tokenizer.from_str(content), model.encode, "SentencePiece")


def convert_ranks(
    path: Path, ranks: dict[bytes, int], folder: Path, pattern: str | None
) -> Converted:
    """Convert tiktoken's file, with the special tokens that `tokenizer_config.json` lists."""
    import tiktoken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    options = {} if pattern is None else {"pattern": pattern}
    converter: Any = TikTokenConverter(vocab_file=str(path), **options)
    try:
        tokenizer: Tokenizer = converter.converted()
        encoding = tiktoken.Encoding(
            path.name, pat_str=converter.pattern, mergeable_ranks=ranks, special_tokens={}
        )
    except Exception as error:  # noqa: BLE001  bindings raise plain Exception
        raise DataError(f"{path}: cannot be converted ({error}); correct --pattern") from None
    for number, text in listed_tokens(folder):
        tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        if tokenizer.token_to_id(text) != number:
            raise DataError(
                f'{folder / CONFIG_NAMES[0]}: "{text}" has id {number}, after the tokens of '
                f"{path.name} it would be {tokenizer.token_to_id(text)}; list all special tokens"
            )
    return Converted(tokenizer, encoding.encode_ordinary, "tiktoken")


def listed_tokens(folder: Path) -> Iterator[tuple[int, str]]:
    """The added tokens of a tokenizer's config, by id."""
    listed = read_json(folder / CONFIG_NAMES[0]).get("added_tokens_decoder")
    entries = listed.items() if isinstance(listed, dict) else ()
    found = {
        int(number): token["content"]
        for number, token in entries
        if number.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
    }
    yield from sorted(found.items())


def texts() -> tuple[str, ...]:
    """The hard texts that name no special token."""
    return tuple(text for text in HARD_TEXTS if "<s>" not in text)


def compare(found: Converted, path: Path, exact: bool) -> int:
    """Return how many hard texts get the ids of the file's own library.

    Raises:
        DataError: a plain text gets others; or, where the conversion is exact, any.
    """
    found.tokenizer.encode_special_tokens = True
    equal = 0
    for text in (*PLAIN_TEXTS, *texts()):
        ids = found.tokenizer.encode(text, add_special_tokens=False).ids
        same = ids == found.reference(text)
        if not same and (exact or text in PLAIN_TEXTS):
            raise DataError(
                f"{path}: transformers' converter gives other ids than {found.library} for "
                f"{text[:60]!r}; name the right tokenizer_class in tokenizer_config.json, or get "
                "the tokenizer.json of the model"
            )
        equal += same and text not in PLAIN_TEXTS
    found.tokenizer.encode_special_tokens = False
    return equal
