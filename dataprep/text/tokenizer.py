"""A directory's `tokenizer.json`, opened as its spec says, and the tokens that are no text."""

import functools
import hashlib
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.schemas.errors import DataError
from headrace.schemas.outside_text import OutsideTextError, parse_json, read_text

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAMES = ("tokenizer_config.json", "special_tokens_map.json")


def add_tokens(content: bytes, added: tuple[tuple[str, bool], ...]) -> bytes:
    """A `tokenizer.json` with further tokens; those that are there already keep their ids."""
    if not added:
        return content
    tokenizer = Tokenizer.from_str(content.decode())
    for text, special in added:
        token = AddedToken(text, normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    return tokenizer.to_str(pretty=True).encode()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        values = parse_json(read_text(path))
    except OutsideTextError as error:
        raise DataError(f"{path}: {error}; replace the file") from None
    return values if isinstance(values, dict) else {}


@functools.lru_cache(maxsize=4)
def open_tokenizer(spec: TokenizerSpec, parse_special_tokens: bool) -> Tokenizer:
    """The tokenizer itself, kept per process; it neither truncates nor pads."""
    tokenizer = Tokenizer.from_str(read_content(spec).decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not parse_special_tokens
    return tokenizer


@functools.lru_cache(maxsize=4)
def control_ids(spec: TokenizerSpec) -> frozenset[int]:
    """The tokens that are no text: those the tokenizer calls special, and EOS."""
    added = open_tokenizer(spec, True).get_added_tokens_decoder()
    eos = {number for role, number in spec.special_tokens if role == "eos"}
    return frozenset(eos | {number for number, token in added.items() if token.special})


def control_texts(spec: TokenizerSpec) -> dict[int, str]:
    """The tokens that are no text, with what stands for them."""
    tokenizer = open_tokenizer(spec, True)
    return {number: tokenizer.id_to_token(number) or "" for number in control_ids(spec)}


def stop_ids(spec: TokenizerSpec) -> frozenset[int]:
    """The tokens at which generation stops."""
    return frozenset(
        [*spec.stops, *(number for role, number in spec.special_tokens if role == "eos")]
    )


def read_content(spec: TokenizerSpec) -> bytes:
    """The bytes of `tokenizer.json`, if they are still those that the run began with."""
    content = Path(spec.file).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found == spec.sha256:  # the copy beside the shards has the added tokens
        return content
    if found != spec.file_sha256:
        raise DataError(f"{spec.file}: changed while it was in use; run again")
    return add_tokens(content, spec.added_tokens)
