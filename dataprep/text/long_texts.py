"""Long texts tokenized in pieces: the library takes 500 bytes a token until it has all of them.

Consecutive pieces overlap. They are joined where both have the same tokens on both sides of a
boundary between words, so that the ids are those of the whole text. Where there is no such place,
as in a megabyte of one letter, the whole text is tokenized at once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

PIECE = 1 << 19  # characters
OVERLAP = 1 << 13
EQUAL_TOKENS = 32  # on each side of the place where two pieces are joined

Numbers = npt.NDArray[np.int32]


class Tokens(NamedTuple):
    """Tokens of a part of a text: ids, their characters in the whole text, and their words."""

    ids: Numbers
    starts: Numbers
    ends: Numbers
    words: Numbers

    def between(self, first: int, last: int) -> "Tokens":
        """Return tokens first to last, the last one left out."""
        return Tokens(*(column[first:last] for column in self))


def encode_long(
    tokenizer: Tokenizer, text: str, piece: int = PIECE, overlap: int = OVERLAP
) -> Tokens:
    """Return the tokens of a text, without those that a post-processor adds.

    Args:
        piece, overlap: characters from one piece's start to the next one's, and how many more it
            has.
    """
    parts: list[Tokens] = []
    for tokens in encode_pieces(tokenizer, text, piece, overlap):
        if not parts:
            parts.append(tokens)
            continue
        joint = find_joint(parts[-1], tokens)
        if joint is None:
            return encode_part(tokenizer, text, 0, len(text))
        parts[-1] = parts[-1].between(0, joint[0])
        parts.append(tokens.between(joint[1], len(tokens.ids)))
    return Tokens(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def encode_pieces(tokenizer: Tokenizer, text: str, piece: int, overlap: int) -> Iterator[Tokens]:
    """Yield the tokens of each piece, which begins before the last one's end."""
    for start in range(0, max(1, len(text) - overlap), piece):
        yield encode_part(tokenizer, text, start, min(len(text), start + piece + overlap))


def encode_part(tokenizer: Tokenizer, text: str, start: int, end: int) -> Tokens:
    """Return the tokens of characters start to end."""
    encoding = tokenizer.encode(text[start:end], add_special_tokens=False)
    places = np.array(encoding.offsets, np.int32).reshape(-1, 2) + start
    words = np.array([-1 if word is None else word for word in encoding.word_ids], np.int32)
    return Tokens(np.array(encoding.ids, np.int32), places[:, 0], places[:, 1], words)


def find_joint(left: Tokens, right: Tokens) -> tuple[int, int] | None:
    """Return how many tokens to take of the left piece, and how many to leave out of the right.

    None where no stretch of equal tokens is long enough.
    """
    if not len(right.ids) or not len(left.ids):
        return None
    first = int(np.searchsorted(left.starts, right.starts[0]))
    last = int(np.searchsorted(right.ends, left.ends[-1], side="right"))
    tail, head = left.between(first, len(left.ids)), right.between(0, last)
    places = {place: index for index, place in enumerate(zip(*key(tail), strict=True))}
    stretch: list[tuple[int, int]] = []
    for index, place in enumerate(zip(*key(head), strict=True)):
        found = places.get(place)
        if found is None or (stretch and stretch[-1][0] + 1 != found):
            stretch = []
        if found is not None:
            stretch.append((found, index))
        if len(stretch) >= 2 * EQUAL_TOKENS and (joint := word_start(stretch, tail, head)):
            return first + joint[0], joint[1]
    return None


def key(tokens: Tokens) -> tuple[list[int], list[int], list[int]]:
    """Return what makes tokens of two pieces equal."""
    return tokens.ids.tolist(), tokens.starts.tolist(), tokens.ends.tolist()


def word_start(
    stretch: list[tuple[int, int]], left: Tokens, right: Tokens
) -> tuple[int, int] | None:
    """Return the places in both pieces of a token in the middle of a stretch that begins a word.

    Where a tokenizer does not cut words first, any token of the middle will do.
    """
    wordless = left.words.max() == left.words.min()
    for one, other in stretch[-EQUAL_TOKENS : len(stretch) - EQUAL_TOKENS + 1]:
        begins = left.words[one] != left.words[one - 1] and (
            right.words[other] != right.words[other - 1]
        )
        if wordless or begins:
            return one, other
    return None
