"""Ids of a text, and the identity of the tokenizer that gives them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenizerSpec:
    """Everything a worker needs to tokenize: small, picklable, and all that decides the ids."""

    file: str = field(compare=False)  # copies of it are the same tokenizer
    file_sha256: str
    sha256: str  # of the content as it is used: with the tokens that the config adds
    vocabulary_size: int
    special_tokens: tuple[tuple[str, int], ...]
    bos: int | None
    eos: int | None
    parse_special_tokens: bool
    backend: str = "tokenizers"  # one that the config may name
    token_texts: tuple[tuple[str, str], ...] = ()
    chat_templates: tuple[tuple[str, str], ...] = ()
    added_tokens: tuple[tuple[str, bool], ...] = ()  # text, and whether it is special
    stops: tuple[int, ...] = ()  # all that generation_config.json calls EOS
    makes_special: bool = False  # its model has special tokens among its pieces

    @property
    def folder(self) -> str:
        """The directory it was read from."""
        return str(Path(self.file).parent)

    def identity(self) -> dict[str, object]:
        """Everything but path and backend: equal identities give equal ids."""
        own: dict[str, object] = {"special_pieces": "text"} if self.makes_special else {}
        return own | {
            "sha256": self.sha256,
            "special_tokens": dict(self.special_tokens),
            "bos": self.bos,
            "eos": self.eos,
            "parse_special_tokens": self.parse_special_tokens,
            "token_texts": dict(self.token_texts),
            "chat_templates": dict(self.chat_templates),
            "stops": list(self.stops),
        }

    @property
    def ends(self) -> frozenset[int]:
        """The ids of BOS and EOS."""
        return frozenset(number for role, number in self.special_tokens if role in ("bos", "eos"))


class Located(NamedTuple):
    """Ids of a text, and for each token the characters [start, end) that it came from."""

    ids: Ids
    starts: Ids
    ends: Ids
