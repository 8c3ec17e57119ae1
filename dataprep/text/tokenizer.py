"""A directory's `tokenizer.json`, opened as its spec says, and the tokens that are no text."""

import functools
import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer

from headrace.dataprep.text.special_pieces import (
    special_pattern,
    special_texts,
    taking_marks_out,
    without_pieces,
    without_special,
)
from headrace.dataprep.text.tokens import Ids, TokenizerSpec
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
    tokenizer = unbounded(text_content(spec, parse_special_tokens))
    tokenizer.encode_special_tokens = not parse_special_tokens
    return tokenizer


def unbounded(content: str) -> Tokenizer:
    """Return a tokenizer that neither truncates nor pads."""
    tokenizer = Tokenizer.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def text_content(spec: TokenizerSpec, parse_special_tokens: bool) -> str:
    """Return the `tokenizer.json` for texts in which special tokens are such, or are text."""
    content = read_content(spec).decode()
    if parse_special_tokens or not spec.makes_special:
        return content
    return without_special(content, special_texts(Tokenizer.from_str(content), spec.ends).values())


class MarkedTokenizer(NamedTuple):
    """A tokenizer for texts with marks, and the ids that its ids stand for, shape [ids]."""

    tokenizer: Tokenizer
    ids: Ids
    pattern: re.Pattern[str]  # of special tokens


@functools.lru_cache(maxsize=2)
def open_marked(spec: TokenizerSpec) -> MarkedTokenizer:
    """The tokenizer that finds special tokens only where no mark stands in them."""
    plain = open_tokenizer(spec, True)
    special = special_texts(plain, spec.ends)
    content = taking_marks_out(read_content(spec).decode(), special.values())
    if spec.makes_special:
        content = without_pieces(content, special.values())
    tokenizer = unbounded(content)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    ids = np.arange(size, dtype=np.int32)
    for number, token in plain.get_added_tokens_decoder().items():
        ids[tokenizer.token_to_id(token.content)] = number
    return MarkedTokenizer(tokenizer, ids, special_pattern(special.values()))


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
