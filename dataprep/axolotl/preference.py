"""Rows with a chosen and a rejected answer, in Axolotl's layouts, to pairs of token sequences."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from headrace.dataprep.axolotl.strategy import (
    Built,
    Plan,
    Row,
    RowError,
    TokenRules,
    as_mask,
    as_number,
    column,
    rows_in,
)
from headrace.dataprep.text.rendering import TemplateRefusedError
from headrace.dataprep.text.sample import Sample
from headrace.dataprep.text.tokens import Ids, Located
from headrace.schemas.outside_text import json_type

TextsT = TypeVar("TextsT")


class Pair(NamedTuple):
    """A prompt and two answers, as texts."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class TextPairs:
    """Prompt and answers as one text each, with EOS where it is missing; the answers are trained.

    Tokenized as TRL's DPO trainer does it, and so what is shared at the start is the prompt.
    """

    rules: TokenRules
    read: Callable[[Row], Pair]
    eos_text: str
    located: bool = False

    def plan(self, row: Row) -> Plan:
        """The prompt alone, and with each answer."""
        try:
            pair = self.read(row)
        except TemplateRefusedError as error:
            raise RowError("refused by the chat template", str(error)) from None
        for name, text in pair._asdict().items():
            if not text:
                raise RowError("empty text", f"the {name} text is empty")
        answers = [
            text if text.endswith(self.eos_text) else text + self.eos_text for text in pair[1:]
        ]
        return Plan([pair.prompt, *(pair.prompt + text for text in answers)], self.build)

    def build(self, found: list[Located]) -> Built:
        """Two sequences, trained from where the prompt ends in either."""
        prompt, chosen, rejected = (own_tokens(self.rules, part.ids) for part in found)
        start = min(common_length(prompt, chosen), common_length(prompt, rejected))
        return one_pair(chosen, start, rejected, start)


def own_tokens(rules: TokenRules, ids: Ids) -> list[int]:
    """Return ids with the tokenizer's own special tokens, but never BOS twice."""
    result = rules.own(ids)[0]
    return result[1:] if result[:2] == [rules.bos] * 2 else result


def one_pair(chosen: list[int], start: int, rejected: list[int], rejected_start: int) -> Built:
    """A preference sample whose answers begin at the given tokens."""
    sample = Sample(
        np.array(chosen, dtype=np.int32),
        as_mask(np.arange(len(chosen)) >= start),
        np.array(rejected, dtype=np.int32),
        as_mask(np.arange(len(rejected)) >= rejected_start),
    )
    return Built([sample])


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences of ids."""
    length = min(len(left), len(right))
    return next((n for n in range(length) if left[n] != right[n]), length)


@dataclass(frozen=True)
class Layout:
    """The way in which a family of chat models writes a turn, and the names of a row's texts.

    `first_turn`: chosen and rejected are conversations of a question and an answer.
    """

    turn: str
    end: str
    prompt: tuple[str, ...]
    chosen: tuple[str, ...] = ("chosen",)
    rejected: tuple[str, ...] = ("rejected",)
    in_turns: bool = False
    with_system: bool = True

    def read(self, row: Row) -> Pair:
        """The texts of a row in the layout."""
        system = row.get("system") if self.with_system else None
        names = self.prompt
        asked = string(row, self.first(row, names)) if names else said(row, "chosen", 0)
        head = self.turn.format(role="system", content=system) if system else ""
        ask = self.turn.format(role="user", content=asked)
        open_turn = self.turn.partition("{content}")[0].format(role="assistant")
        answers = (
            self.answer(row, self.first(row, names)) for names in (self.chosen, self.rejected)
        )
        return Pair(head + ask + open_turn, *(answer + self.end for answer in answers))

    def answer(self, row: Row, name: str) -> str:
        """The answer in a column."""
        return said(row, name, 1) if self.in_turns else string(row, name)

    def first(self, row: Row, names: tuple[str, ...]) -> str:
        """The first of several columns that a row has, or the last."""
        return next((name for name in names if name in row), names[-1])


TURNS = {
    "chatml": ("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_end|>"),
    "llama3": ("<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>", "<|eot_id|>"),
}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "default": {
        "prompt": ("prompt", "input", "question", "instruction"),
        "chosen": ("chosen", "chosen_response"),
        "rejected": ("rejected", "rejected_response"),
    },
    "icr": {"prompt": ("input",)},
    "intel": {"prompt": ("question",)},
    "prompt_pairs": {"prompt": ("prompt",)},
    "ultra": {"prompt": ("prompt",), "in_turns": True},
    "argilla_chat": {"prompt": (), "in_turns": True, "with_system": False},
}
LAYOUTS = {
    f"{family}.{kind}": Layout(turn, end, **options)
    for family, (turn, end) in TURNS.items()
    for kind, options in KINDS.items()
}


def nectar(row: Row) -> Pair:
    """Ranked answers: Axolotl takes the two of the largest ranks, the last as chosen."""
    ranked = [(as_number(column(one, "rank"), "rank"), one) for one in rows_in(row, "answers")]
    answers = [answer for _, answer in sorted(ranked, key=lambda pair: pair[0])]
    if len(answers) < 2:
        raise RowError("too few answers", f"{len(answers)}, needs two")
    prompt = f"<|system|>\n</s>\n<|user|>\n{string(row, 'prompt')}</s>\n<|assistant|>\n"
    return Pair(prompt, string(answers[-1], "answer"), string(answers[-2], "answer"))


def passthrough(row: Row) -> Pair:
    """Texts that are written out already."""
    return Pair(string(row, "prompt"), string(row, "chosen"), string(row, "rejected"))


CUSTOM_PAIR = {
    "field_system": "system",
    "field_prompt": "prompt",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "prompt_format": "{prompt}",
    "chosen_format": "{chosen}",
    "rejected_format": "{rejected}",
}


@dataclass(frozen=True)
class CustomTexts(Generic[TextsT]):
    """A `type:` that is a table of columns and formats: for a pair, or a single answer.

    Args:
        made: makes one of the texts of the fields.
    """

    options: Mapping[str, str]
    fields: tuple[str, ...]
    made: Callable[..., TextsT]

    def __call__(self, row: Row) -> TextsT:
        """Return the texts of a row in the formats; that of a prompt may name the system text."""
        options = self.options
        system = row.get(options["field_system"]) or ""
        texts = {name: string(row, options[f"field_{name}"]) for name in self.fields}
        return self.made(
            *(
                options[f"{name}_format"].format(system=system, **{name: text})
                for name, text in texts.items()
            )
        )


def string(row: Row, name: str) -> str:
    """The text of a column; null is none."""
    value = column(row, name)
    if not isinstance(value, str):
        raise RowError("not a string", f'field "{name}" is {json_type(value)}')
    return value


def said(row: Row, name: str, number: int) -> str:
    """Return the content of one message of a conversation."""
    turns = rows_in(row, name)
    for turn in turns:
        refuse_tools(turn)
    try:
        return string(turns[number], "content")
    except IndexError:
        raise RowError("too few turns", f'{len(turns)} in "{name}"') from None


def refuse_tools(turn: Row) -> None:
    """Refuse a message with tool calls, where only roles and contents are read."""
    if turn.get("tool_calls"):
        raise RowError("tool calls", 'this type leaves them out; use type = "preference"')
