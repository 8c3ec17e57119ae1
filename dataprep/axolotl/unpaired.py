"""Rows with one answer and a label, in Axolotl's layouts of `rl: kto`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from headrace.dataprep.axolotl.preference import TURNS, common_length, own_tokens, string
from headrace.dataprep.axolotl.strategy import (
    Built,
    Plan,
    Row,
    RowError,
    TokenRules,
    as_mask,
    rows_in,
)
from headrace.dataprep.text.conversation import ConversationError, read_label
from headrace.dataprep.text.sample import Sample
from headrace.dataprep.text.tokens import Located
from headrace.schemas.fingerprint import canonical_json


class Answer(NamedTuple):
    """A prompt and one answer, as texts."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class LabeledAnswers:
    """Prompt and answer as one text, with EOS where it is missing; the answer is trained.

    Tokenized as TRL's KTO trainer does it: the answer begins where the tokens of the prompt alone
    and those of both part.
    """

    rules: TokenRules
    read: Callable[[Row], Answer]
    eos_text: str
    label: str = "label"
    located: bool = False

    def plan(self, row: Row) -> Plan:
        """The prompt alone, and with its answer."""
        prompt, answer = self.read(row)
        if not prompt or not answer:
            raise RowError("empty text", f"the {'answer' if prompt else 'prompt'} is empty")
        desirable = label_of(row, self.label)
        whole = prompt + (answer if answer.endswith(self.eos_text) else answer + self.eos_text)

        def build(found: list[Located]) -> Built:
            start, ids = (own_tokens(self.rules, part.ids) for part in found)
            mask = as_mask(np.arange(len(ids)) >= common_length(start, ids))
            return Built([Sample(np.array(ids, dtype=np.int32), mask, desirable=desirable)])

        return Plan([prompt, whole], build, canonical_json([prompt, whole, desirable]))


def label_of(row: Row, name: str) -> bool:
    """Return the label of a row."""
    try:
        return read_label(row, name)
    except ConversationError as error:
        raise RowError(error.reason, error.detail) from None


@dataclass(frozen=True)
class AnswerLayout:
    """The way in which a family of chat models writes a prompt and one answer.

    `prompt` names the column of the question; None: the answer's column is a conversation.
    """

    turn: str
    end: str
    prompt: str | None

    def __call__(self, row: Row) -> Answer:
        """The texts of a row in the layout."""
        open_turn = self.turn.partition("{content}")[0].format(role="assistant")
        if self.prompt is None:
            return self.conversation(row, open_turn)
        system = row.get("system")
        head = self.turn.format(role="system", content=system) if system else ""
        ask = self.turn.format(role="user", content=string(row, self.prompt))
        return Answer(head + ask + open_turn, string(row, "completion") + self.end)

    def conversation(self, row: Row, open_turn: str) -> Answer:
        """The texts of a conversation whose last message is the answer."""
        turns = rows_in(row, "completion")
        if len(turns) < 2:
            raise RowError("too few turns", f'{len(turns)} in "completion"')
        asked = [
            self.turn.format(role=string(turn, "role"), content=string(turn, "content"))
            for turn in turns[:-1]
        ]
        return Answer("".join(asked) + open_turn, string(turns[-1], "content") + self.end)


PROMPTS = {
    "argilla": "instruction",
    "argilla_chat": None,
    "intel": "question",
    "prompt_pairs": "prompt",
    "ultra": "prompt",
}
ANSWER_LAYOUTS: dict[str, Callable[[Row], Answer]] = {
    f"{family}.{kind}": AnswerLayout(turn, end, prompt)
    for family, (turn, end) in TURNS.items()
    for kind, prompt in PROMPTS.items()
}
CUSTOM_ANSWER = {
    "field_system": "system",
    "field_prompt": "prompt",
    "field_completion": "completion",
    "field_label": "label",
    "prompt_format": "{prompt}",
    "completion_format": "{completion}",
}


def plain_answer(row: Row) -> Answer:
    """Texts that are written out already."""
    return Answer(string(row, "prompt"), string(row, "completion"))
