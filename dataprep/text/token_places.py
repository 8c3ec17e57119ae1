"""Places of tokens in their text, by the bytes that each token stands for.

`tokenizers` takes several times as long for a text with its tokens' places as without, and faster
tokenizers give none. Tokens of a byte-level model are the bytes of the text, cut: their lengths
tell where each of them lies. Read against tokenizers 0.23, whose places these are to the last one.
"""

import functools
import json
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from headrace.dataprep.text.fast_tokenizer import HARD_TEXTS
from headrace.dataprep.text.tokenizer import open_tokenizer
from headrace.dataprep.text.tokens import Ids, Located, TokenizerSpec

SPACE = "\u0120"  # as byte-level models write a space
NEUTRAL = ("TemplateProcessing", "ByteLevel")  # post-processors that leave ids alone
FOLLOWS = 0x80  # the upper two bits of a byte that goes on a character, under 0xC0


class TokenPlaces(NamedTuple):
    """Bytes and spaces of all tokens of a tokenizer, which tell their places.

    `sizes` are the bytes of each id; `leading` and `trailing` the spaces at its ends that its place
    leaves out, or None where places keep them. `first_kept` tells that the first token of a text
    keeps one space, and `composed` that texts are brought to NFC.
    """

    sizes: Ids
    leading: Ids | None
    trailing: Ids | None
    first_kept: bool
    composed: bool

    def locate(self, text: str, ids: Ids) -> Located | None:
        """Return a text's tokens with their places; None where they are not the text's bytes."""
        sizes = self.sizes[ids]
        ends = np.cumsum(sizes, dtype=np.int32)
        size = int(ends[-1]) if len(ends) else 0
        starts = ends - sizes
        if text.isascii():
            if size != len(text):
                return None
        else:
            if self.composed and not unicodedata.is_normalized("NFC", text):
                return None
            content = text.encode()
            if size != len(content):
                return None
            starts, ends = in_characters(content, starts, ends)
        return Located(ids, *self.trimmed(ids, starts, ends))

    def trimmed(self, ids: Ids, starts: Ids, ends: Ids) -> tuple[Ids, Ids]:
        """Return places less the spaces at their edges, where the tokenizer leaves them out."""
        if self.leading is None or self.trailing is None:
            return starts, ends
        leading, trailing = self.leading[ids], self.trailing[ids]
        if self.first_kept:
            leading = np.where((starts == 0) & (leading > 0), leading - 1, leading)
        starts = np.minimum(starts + leading, ends)
        return starts, np.where(ends >= trailing, np.maximum(ends - trailing, starts), ends)


def in_characters(content: bytes, starts: Ids, ends: Ids) -> tuple[Ids, Ids]:
    """Return places in the characters of a text; a token in a character takes all of it."""
    begins = (np.frombuffer(content, np.uint8) & 0xC0) != FOLLOWS
    number = np.cumsum(begins, dtype=np.int32)  # of the character that a byte is in, from 1
    return number[starts] - 1, number[ends - 1]


@functools.lru_cache(maxsize=4)
def token_places(spec: TokenizerSpec, parse_special_tokens: bool) -> TokenPlaces | None:
    """Return what tells the places of a tokenizer's tokens; None where their bytes do not.

    What it tells is compared with the tokenizer's own places, on hard texts, once a process.
    """
    tokenizer = open_tokenizer(spec, parse_special_tokens)
    if not is_byte_level(tokenizer):
        return None
    places = read_places(tokenizer)
    encodings = tokenizer.encode_batch(HARD_TEXTS, add_special_tokens=False)
    for text, encoding in zip(HARD_TEXTS, encodings, strict=True):
        found = places.locate(text, np.array(encoding.ids, np.int32))
        if found is None:
            if places.composed and not unicodedata.is_normalized("NFC", text):
                continue
            return None
        if list(zip(found.starts.tolist(), found.ends.tolist(), strict=True)) != encoding.offsets:
            return None
    return places


def read_places(tokenizer: Tokenizer) -> TokenPlaces:
    """Return the bytes and spaces of all tokens of a byte-level tokenizer."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    added = {n: t.content for n, t in tokenizer.get_added_tokens_decoder().items()}
    size = max([*vocabulary.values(), *added], default=-1) + 1
    sizes, leading, trailing = (np.zeros(size, np.int32) for _ in range(3))
    texts = {number: piece for piece, number in vocabulary.items()} | added
    numbers = np.fromiter(texts, np.int64, len(texts))
    sizes[numbers] = np.fromiter(map(len, texts.values()), np.int32, len(texts))
    for number, text in added.items():
        sizes[number] = len(text.encode())
    trims = [step for step in post_processors(tokenizer) if step.get("trim_offsets")]
    if not trims:
        return TokenPlaces(sizes, None, None, False, tokenizer.normalizer is not None)
    for number, text in texts.items():
        if is_space(text[:1]) or is_space(text[-1:]):
            leading[number] = spaces(text)
            trailing[number] = spaces(text[::-1])
    kept = bool(trims[0].get("add_prefix_space"))
    return TokenPlaces(sizes, leading, trailing, kept, tokenizer.normalizer is not None)


def is_space(text: str) -> bool:
    """Return whether a character of a token is a space."""
    return text == SPACE or text.isspace()


def spaces(text: str) -> int:
    """Return how many spaces a token begins with."""
    return next((place for place, letter in enumerate(text) if not is_space(letter)), len(text))


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Return whether the tokens of a text are its bytes, cut."""
    model = tokenizer.model
    whole = not any(
        getattr(model, name, None) for name in ("continuing_subword_prefix", "end_of_word_suffix")
    )
    cuts = steps(state(tokenizer.pre_tokenizer), "pretokenizers")
    last = [step for step in cuts if step.get("type") == "ByteLevel"]
    added = tokenizer.get_added_tokens_decoder().values()
    return (
        type(model).__name__ == "BPE"
        and whole
        and not model.dropout
        and state(tokenizer.normalizer) in ({}, {"type": "NFC"})
        and len(last) == 1
        and not last[0].get("add_prefix_space")
        and all(step.get("type") in NEUTRAL for step in post_processors(tokenizer))
        and not any(token.lstrip or token.rstrip for token in added)
    )


def post_processors(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the steps after the model."""
    return list(steps(state(tokenizer.post_processor), "processors"))


def steps(values: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a sequence, or a single one."""
    if values.get("type") == "Sequence":
        for part in values[name]:
            yield from steps(part, name)
    elif values:
        yield values


def state(part: Any) -> dict[str, Any]:
    """Return the settings of a part of a tokenizer as `tokenizer.json` has them, empty for none."""
    return {} if part is None else dict(json.loads(part.__getstate__()))
