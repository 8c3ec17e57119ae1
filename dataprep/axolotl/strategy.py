"""What the strategies share: a row names its texts, all texts of a batch are tokenised together."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from headrace.dataprep.formats.sample import Encoded, Mask, Sample
from headrace.dataprep.records import Record, Reject, json_type, refuse
from headrace.dataprep.tokenizer import (
    Ids,
    Located,
    TokenizerSpec,
    encode_located,
    encode_texts,
    open_tokenizer,
)
from headrace.schemas.axolotl_config import AxolotlConfig
from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import canonical_json, derive_seed

CUT = "cut by the format"
SHORT = "shorter than min_sample_len"
UNTRAINED = "nothing in it is trained"
NOT_CHOSEN = "outside the chosen rows"
Row = Mapping[str, Any]


class RowError(Exception):
    """A row that cannot be used: the short reason that is counted, and what was seen."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Built(NamedTuple):
    """What a row became: its samples, and how many tokens its format cut off."""

    samples: list[Sample]
    cut: int = 0


class Plan(NamedTuple):
    """The texts of a row, tokenised without the tokenizer's own special tokens, and their use.

    `content` stands for the row where its texts do not.
    """

    texts: list[str]
    build: Callable[[list[Located]], Built]
    content: str | None = None


class Strategy(Protocol):
    """One of Axolotl's prompt strategies."""

    @property
    def located(self) -> bool:
        """Whether `build` needs to know where in its text each token lies."""
        ...

    def plan(self, row: Row) -> Plan:
        """What is to be done with one row.

        Raises:
            RowError: the row cannot be used.
        """
        ...


@dataclass(frozen=True)
class TokenRules:
    """What the tokenizer itself adds, and what decides lengths and masks.

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


def token_rules(spec: TokenizerSpec, sequence_len: int, train_on_inputs: bool) -> TokenRules:
    """Read from the tokenizer what it adds."""
    encoding = open_tokenizer(spec, True).encode("a", add_special_tokens=True)
    added = np.array(encoding.special_tokens_mask, dtype=bool)
    text = np.flatnonzero(~added)
    first, last = (int(text[0]), int(text[-1])) if len(text) else (len(added), len(added))
    special = dict(spec.special_tokens)
    return TokenRules(
        spec=spec,
        sequence_len=sequence_len,
        train_on_inputs=train_on_inputs,
        before=tuple(encoding.ids[:first]),
        after=tuple(encoding.ids[last + 1 :]),
        bos=special.get("bos"),
        eos=special.get("eos"),
    )


class AxolotlFormat:
    """A strategy as a row format, with the options that leave rows out."""

    columns: frozenset[str] | None = None

    def __init__(
        self,
        strategy: Strategy,
        spec: TokenizerSpec,
        options: AxolotlConfig,
        sequence_len: int,
        seed: int,
    ) -> None:
        self.strategy = strategy
        self.spec = spec
        self.options = options
        self.sequence_len = sequence_len
        self.chosen = RowChoice(options, seed)

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Reject]:
        """Samples of each row."""
        plans = [self.plan(record) for record in records]
        texts = [text for plan in plans if isinstance(plan, Plan) for text in plan.texts]
        tokens = iter(self.tokenise(texts))
        for record, plan in zip(records, plans, strict=True):
            if isinstance(plan, Plan):
                yield self.build(record, plan, [next(tokens) for _ in plan.texts])
            else:
                yield plan

    def plan(self, record: Record) -> Plan | Encoded | Reject:
        """The strategy's plan, or why there is none."""
        if not self.chosen.takes(record):
            return Encoded("", [], {NOT_CHOSEN: 0})
        try:
            return self.strategy.plan(record.fields)
        except RowError as error:
            return refuse(record.place, error.reason, str(error))
        except DataError as error:
            raise DataError(f"{record.place.file}:{record.place.number()}: {error}") from None

    def tokenise(self, texts: list[str]) -> list[Located]:
        """All texts in one call; special tokens that are written out in them count as such."""
        if self.strategy.located:
            return encode_located(self.spec, texts)
        nowhere = np.empty(0, np.int32)
        return [Located(ids, nowhere, nowhere) for ids in encode_texts(self.spec, texts)]

    def build(self, record: Record, plan: Plan, found: list[Located]) -> Encoded | Reject:
        """The samples of one row, less those that the options leave out, which are counted."""
        try:
            built = plan.build(found)
        except RowError as error:
            return refuse(record.place, error.reason, str(error))
        if not built.samples:
            return refuse(record.place, "empty document", "the tokenizer gives no token")
        dropped = Counter({CUT: built.cut})
        kept = []
        for sample in built.samples:
            reason = self.drop_reason(record, sample)
            if reason is None:
                kept.append(sample)
            else:
                dropped[reason] += sample.tokens
        counts = {reason: count for reason, count in dropped.items() if count}
        content = "\0".join(plan.texts) if plan.content is None else plan.content
        return Encoded(content, kept, counts)

    def drop_reason(self, record: Record, sample: Sample) -> str | None:
        """Why a sample is left out, or None."""
        if len(sample.ids) < self.options.min_sample_len:
            return SHORT
        if self.options.drop_untrained and not sample.trained_tokens:
            return UNTRAINED
        if self.options.raise_on_long and len(sample.ids) > self.sequence_len:
            raise DataError(
                f"{record.place.file}:{record.place.number()}: {len(sample.ids)} tokens, more than "
                f"sequence_len = {self.sequence_len}, at which excess_length_strategy: raise stops"
            )
        return None


class RowChoice:
    """Which rows of a source are taken: a range of them, or a share by their content."""

    def __init__(self, options: AxolotlConfig, seed: int) -> None:
        self.ranges = options.row_ranges
        self.shards = options.shards if options.shards_idx is not None else None
        self.index = options.shards_idx
        self.weight = options.weight
        self.seed = seed

    def takes(self, record: Record) -> bool:
        """Whether a row is taken."""
        if self.ranges is not None:
            start, end = self.ranges.get(record.place.file, (0, 0))
            if not start < record.place.number() <= end:
                return False
        if self.shards is None and (self.weight is None or self.weight == 1):
            return True
        content = canonical_json(record.fields)
        if self.shards and derive_seed(self.seed, "shard", content) % self.shards != self.index:
            return False
        share = derive_seed(self.seed, "weight", content) / 2**64
        return self.weight is None or share < self.weight


def one_sample(ids: Sequence[int] | Ids, trained: npt.ArrayLike | None, cut: int = 0) -> Built:
    """A row of one sample, or of none where there is no token."""
    if not len(ids):
        return Built([], cut)
    return Built([Sample(np.array(ids, dtype=np.int32), as_mask(trained))], cut)


def as_mask(trained: npt.ArrayLike | None) -> Mask | None:
    """Which tokens are trained; None where all are."""
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


def rows_in(row: Row, name: str) -> list[Row]:
    """The objects of a column that holds a list of them."""
    value = column(row, name)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError("not a list of objects", f'field "{name}" is {json_type(value)}')
    return value
