"""A strategy as a row format: a block's texts in one call, and the rows that options leave out."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from headrace.dataprep.axolotl.strategy import Plan, RowError, Strategy
from headrace.dataprep.input.records import Record, Reject
from headrace.dataprep.input.streams import line_of, refuse
from headrace.dataprep.text.encoding import encode_located, encode_texts
from headrace.dataprep.text.row_format import Encoded
from headrace.dataprep.text.sample import Sample
from headrace.dataprep.text.tokens import Located, TokenizerSpec
from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import canonical_json, derive_seed
from headrace.schemas.prepare.axolotl_config import AxolotlConfig

CUT = "cut by the format"
SHORT = "shorter than min_sample_len"
UNTRAINED = "nothing in it is trained"
NOT_CHOSEN = "outside the chosen rows"


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
        tokens = iter(self.tokenize(texts))
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
            raise DataError(f"{record.place.file}:{line_of(record.place)}: {error}") from None

    def tokenize(self, texts: list[str]) -> list[Located]:
        """Tokenize all texts in one call; special tokens that are written out in them count."""
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
        lost = Counter[str]()
        kept = []
        for sample in built.samples:
            reason = self.drop_reason(record, sample)
            if reason is None:
                kept.append(sample)
            else:
                dropped[reason] += sample.tokens
                lost[reason] += len(sample.pictures)
        counts = {reason: count for reason, count in dropped.items() if count}
        content = "\0".join(plan.texts) if plan.content is None else plan.content
        pictures = {reason: count for reason, count in lost.items() if count}
        return Encoded(content, kept, counts, built.notes, pictures)

    def drop_reason(self, record: Record, sample: Sample) -> str | None:
        """Why a sample is left out, or None."""
        if len(sample.ids) < self.options.min_sample_len:
            return SHORT
        if self.options.drop_untrained and not sample.trained_tokens:
            return UNTRAINED
        if self.options.raise_on_long and len(sample.ids) > self.sequence_len:
            raise DataError(
                f"{record.place.file}:{line_of(record.place)}: {len(sample.ids)} tokens, more than "
                f"sequence_len = {self.sequence_len}, at which excess_length_strategy: raise stops"
            )
        return None


class RowChoice:
    """Choice of the rows of a source: a range of them, or a share by their content."""

    def __init__(self, options: AxolotlConfig, seed: int) -> None:
        self.ranges = options.row_ranges
        self.shards = options.shards if options.shards_idx is not None else None
        self.index = options.shards_idx
        self.weight = options.weight
        self.seed = seed

    def takes(self, record: Record) -> bool:
        """Return whether a row is taken."""
        if self.ranges is not None:
            start, end = self.ranges.get(record.place.file, (0, 0))
            if not start < line_of(record.place) <= end:
                return False
        if self.shards is None and (self.weight is None or self.weight == 1):
            return True
        content = canonical_json(record.fields)
        if self.shards and derive_seed(self.seed, "shard", content) % self.shards != self.index:
            return False
        share = derive_seed(self.seed, "weight", content) / 2**64
        return self.weight is None or share < self.weight
