"""Texts without a prompt: completion, pretraining windows, and segments with labels."""

from dataclasses import dataclass

import numpy as np

from headrace.dataprep.axolotl.strategy import (
    Built,
    Plan,
    Row,
    RowError,
    TokenRules,
    as_text,
    column,
    one_sample,
    rows_in,
    text_of,
)
from headrace.dataprep.text.sample import Sample
from headrace.dataprep.text.tokens import Located
from headrace.schemas.outside_text import json_type

COMPLETION_ROWS = 64  # a text is cut after so many times `sequence_len`
MOST_OVERLAP = 256


@dataclass(frozen=True)
class Completion:
    """One text, all of it trained, cut into samples of `sequence_len` tokens."""

    rules: TokenRules
    field: str
    located: bool = False

    def plan(self, row: Row) -> Plan:
        """The text."""
        text = text_of(row, self.field)
        return Plan([text] if text else [], self.build)

    def build(self, found: list[Located]) -> Built:
        """BOS on the first sample only, EOS on the last only."""
        if not found:
            return Built([])
        length = self.rules.sequence_len
        ids, cut = self.rules.own(found[0].ids, COMPLETION_ROWS * length)
        if ids and ids[-1] != self.rules.need_eos() and len(ids) < COMPLETION_ROWS * length:
            ids.append(self.rules.need_eos())
        pieces = (ids[start : start + length] for start in range(0, len(ids), length))
        return Built([Sample(np.array(piece, dtype=np.int32)) for piece in pieces], cut)


@dataclass(frozen=True)
class Pretrain:
    """One text in overlapping windows of `sequence_len` - 1 tokens, each with EOS."""

    rules: TokenRules
    field: str
    located: bool = False

    def plan(self, row: Row) -> Plan:
        """The text."""
        value = column(row, self.field)
        if not isinstance(value, str):
            raise RowError("not a string", f'field "{self.field}" is {json_type(value)}')
        return Plan([value], self.build)

    def build(self, found: list[Located]) -> Built:
        """Each window begins `overlap` tokens before the end of the last."""
        rules = self.rules
        ids = found[0].ids
        width = rules.sequence_len - 1 - len(rules.before) - len(rules.after)
        overlap = min(MOST_OVERLAP, (rules.sequence_len - 1) // 2)
        starts = range(0, max(len(ids) - overlap, 1), max(width - overlap, 1))
        samples = [
            np.array([*rules.own(ids[start : start + width])[0], rules.need_eos()], dtype=np.int32)
            for start in starts
        ]
        return Built([Sample(window) for window in samples])


@dataclass(frozen=True)
class InputOutput:
    """Segments, tokenized apart without any special token, each with a label: trained or not."""

    rules: TokenRules
    located: bool = False

    def plan(self, row: Row) -> Plan:
        """The texts of the segments."""
        segments = rows_in(row, "segments")
        texts = [as_text(column(segment, "text"), "text") for segment in segments]
        labels = [bool(column(segment, "label")) for segment in segments]

        def build(found: list[Located]) -> Built:
            ids = [part.ids for part in found]
            trained = np.repeat(np.array(labels, bool), [len(part) for part in ids])
            trained |= self.rules.train_on_inputs
            return one_sample(np.concatenate(ids) if ids else [], trained)

        return Plan(texts, build)
