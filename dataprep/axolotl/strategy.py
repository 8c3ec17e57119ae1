"""Protocol and helpers that the strategies share.

A row names its texts, and all texts of a batch are tokenized together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from headrace.dataprep.text.sample import Mask, Sample
from headrace.dataprep.text.tokens import Ids, Located, TokenizerSpec
from headrace.schemas.errors import DataError
from headrace.schemas.outside_text import json_type

Row = Mapping[str, Any]


class RowError(Exception):
    """A row that cannot be used: the short reason that is counted, and what was seen."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Built(NamedTuple):
    """Samples made of a row, the tokens that its format cut off, and counts of oddities."""

    samples: list[Sample]
    cut: int = 0
    notes: Mapping[str, int] = {}


class Plan(NamedTuple):
    """The texts of a row, tokenized without the tokenizer's own special tokens, and their use.

    `content` stands for the row where its texts do not.
    """

    texts: list[str]
    build: Callable[[list[Located]], Built]
    content: str | None = None


class Strategy(Protocol):
    """One of Axolotl's prompt strategies."""

    @property
    def located(self) -> bool:
        """Return whether `build` needs the position in its text of each token."""
        ...

    def plan(self, row: Row) -> Plan:
        """Return the texts of one row to tokenize, and what to build of them.

        Raises:
            RowError: the row cannot be used.
        """
        ...


@dataclass(frozen=True)
class TokenRules:
    """Tokens that the tokenizer itself adds, and settings that decide lengths and masks.

    `before` and `after` are the ids that its post-processor puts around a text.
    """

    spec: TokenizerSpec
    sequence_len: int
    train_on_inputs: bool
    before: tuple[int, ...]
    after: tuple[int, ...]
    bos: int | None
    eos: int | None

    def own(self, ids: Ids, limit: int | None = None) -> tuple[list[int], int]:
        """A text's ids with the tokenizer's own special tokens, and how many ids `limit` cut."""
        room = len(ids) if limit is None else limit - len(self.before) - len(self.after)
        kept = ids[: max(room, 0)]
        return [*self.before, *kept.tolist(), *self.after], len(ids) - len(kept)

    def need_eos(self) -> int:
        """The id of EOS.

        Raises:
            DataError: the tokenizer names none.
        """
        if self.eos is None:
            raise DataError(
                f"{self.spec.file}: no EOS token is named beside it, but the format ends answers "
                'with it; name it in tokenizer_config.json as "eos_token"'
            )
        return self.eos


def one_sample(ids: Sequence[int] | Ids, trained: npt.ArrayLike | None, cut: int = 0) -> Built:
    """A row of one sample, or of none where there is no token."""
    if not len(ids):
        return Built([], cut)
    return Built([Sample(np.array(ids, dtype=np.int32), as_mask(trained))], cut)


def as_mask(trained: npt.ArrayLike | None) -> Mask | None:
    """Return the loss mask of some tokens; None where all are trained."""
    mask = None if trained is None else np.asarray(trained, dtype=np.bool_)
    return None if mask is None or mask.all() else mask


def column(row: Row, name: str) -> Any:
    """The value of a column that must be there, though it may be null."""
    if name not in row:
        raise RowError("missing field", f'no field "{name}"')
    return row[name]


def text_of(row: Row, name: str) -> str:
    """The text of a column; null and other empty values are the empty text."""
    return as_text(column(row, name), name)


def as_text(value: Any, name: str) -> str:
    """A string as it is, an empty value as the empty text."""
    if not value:
        return ""
    if not isinstance(value, str):
        raise RowError("not a string", f'field "{name}" is {json_type(value)}')
    return value


def as_number(value: Any, name: str) -> float:
    """A number, or true and false as 1 and 0."""
    if not isinstance(value, int | float):
        raise RowError("not a number", f'field "{name}" is {json_type(value)}')
    return value


def rows_in(row: Row, name: str) -> list[Row]:
    """The objects of a column that holds a list of them."""
    value = column(row, name)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError("not a list of objects", f'field "{name}" is {json_type(value)}')
    return value
