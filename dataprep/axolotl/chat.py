"""`chat_template`: conversations rendered by a template, with Axolotl's rules for their masks."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from headrace.dataprep.axolotl.strategy import Built, Plan, Row, RowError, one_sample
from headrace.dataprep.axolotl.turn_spans import SpannedChat, find_difference, find_spans
from headrace.dataprep.axolotl.turns import Detail, Turn, TurnReader
from headrace.dataprep.text.chat_mask import span_tokens
from headrace.dataprep.text.chat_template import ChatTemplate
from headrace.dataprep.text.rendering import Message, Span, TemplateRefusedError
from headrace.dataprep.text.sample import Mask
from headrace.dataprep.text.template_environment import RESERVED
from headrace.dataprep.text.tokens import Ids, Located
from headrace.schemas.outside_text import json_type
from headrace.schemas.prepare.axolotl_config import Ends

NEAR = 3  # tokens between a turn and the token that ends it, at most
MARK = "\ue0d20\ue0d3"


class Part(NamedTuple):
    """Characters of a rendering that are trained; with `detail`, only some of the text there."""

    span: Span
    detail: Detail | None = None
    text: str = ""


class Visit(NamedTuple):
    """A turn that is looked at: whether it is trained, its characters, and those trained."""

    trained: bool
    span: Span | None
    parts: list[Part]


@dataclass(frozen=True)
class TrainRules:
    """Rules that decide which turns, and which of the tokens that end them, are trained.

    Args:
        eot: tokens that end a turn.
        control: the texts of all tokens that are no text.
    """

    roles: frozenset[object]
    every_role: bool
    on_eos: Ends
    on_eot: Ends
    eos: frozenset[int]
    eot: frozenset[int]
    control: Mapping[int, str] = field(default_factory=dict)

    def trains(self, turn: Turn) -> bool:
        """Return whether a turn is trained: it may say so itself."""
        if turn.training is not None:
            return turn.training
        if turn.detail is not None or turn.reasoning_detail is not None:
            return bool(turn.detail) or bool(turn.reasoning_detail)
        return self.every_role or turn.role in self.roles

    def visits(self, turn: Turn) -> bool:
        """Return whether a turn must be located in the text."""
        return self.trains(turn) or "all" in (self.on_eos, self.on_eot)


@dataclass(frozen=True)
class ChatStrategy:
    """Conversations as one text, in which each turn's characters say which tokens are its own."""

    reader: TurnReader
    template: ChatTemplate
    train: TrainRules
    located: bool = True

    def plan(self, row: Row) -> Plan:
        """The rendering, and contents of which only some characters are trained."""
        turns, tools = self.reader.read(row)
        messages = [turn.message for turn in turns]
        wanted = [index for index, turn in enumerate(turns) if self.train.visits(turn)]
        try:
            check_reserved(json.dumps([messages, tools], ensure_ascii=False, default=str))
            rendered = find_spans(self.template, messages, tools, wanted)
            visits = [self.visit(turns, index, rendered, tools) for index in wanted]
        except TemplateRefusedError as error:
            raise RowError("refused by the chat template", str(error)) from None
        details = [part for visit in visits for part in visit.parts if part.detail is not None]

        def build(found: list[Located]) -> Built:
            if not len(found[0].ids):
                return Built([])
            trained = train_tokens(self.train, visits, found[0], iter(found[1:]))
            notes = untrained_ends(self.train, visits, found[0], trained)
            return one_sample(found[0].ids, trained)._replace(notes=notes)

        return Plan([rendered.rendering.text, *(part.text for part in details)], build)

    def visit(
        self, turns: list[Turn], index: int, rendered: SpannedChat, tools: list[Any] | None
    ) -> Visit:
        """The characters of one turn: beside reasoning, details are of the content alone."""
        turn = turns[index]
        trained = self.train.trains(turn)
        key = self.reader.thinking_key
        reasoning = turn.message.get(key)
        messages = [turn.message for turn in turns]
        rendering, span = rendered.rendering, rendered.turns[index]
        if (turn.detail or turn.reasoning_detail) and reasoning is not None:
            changed = bare(turn.message, "content") | {key: reasoning}
            span = find_difference(self.template, messages, index, changed, rendering, tools)
        parts = []
        if trained and span:
            content = turn.message.get("content", "")
            if turn.detail and not isinstance(content, str):
                raise RowError("not a string", f"a content with details is {json_type(content)}")
            if turn.detail:
                parts.append(Part(span, turn.detail, content))
            elif not turn.reasoning_detail:
                parts.append(Part(span))
        if trained and turn.reasoning_detail and reasoning is not None:
            changed = bare(turn.message, key) | {"content": turn.message.get("content", "")}
            thought = find_difference(self.template, messages, index, changed, rendering, tools)
            if thought:
                parts.append(Part(thought, turn.reasoning_detail, reasoning))
        return Visit(trained, span, parts)


def bare(message: Message, key: str) -> Message:
    """A message of the same role with a mark in one property, and nothing else."""
    return {"role": message.get("role"), key: MARK}


def check_reserved(text: str) -> None:
    """Refuse a conversation with characters that mark places."""
    if any(character in text for character in RESERVED):
        raise RowError("reserved characters", "U+FDD0 to U+FDD3, which are no text")


def train_tokens(
    rules: TrainRules, visits: Sequence[Visit], text: Located, details: Iterator[Located]
) -> Mask:
    """Return the loss mask of a conversation, shape [tokens].

    Args:
        details: the tokens of each content that is trained in part, in order.
    """
    trained = np.zeros(len(text.ids), np.bool_)
    last = {"eot": -1, "eos": -1}
    for visit in visits:
        for part in visit.parts:
            tokens = span_tokens(text, part.span)
            if part.detail is None:
                trained[tokens] = True
            else:
                inside = detail_tokens(next(details), len(part.text), part.detail)
                places = np.array(inside, dtype=np.int64) + tokens.start
                trained[places[places < len(trained)]] = True
        span = None if visit.span is None else span_tokens(text, visit.span)
        stop = -1 if span is None or span.stop <= span.start else span.stop
        for kind, ends, option in (
            ("eot", rules.eot, rules.on_eot),
            ("eos", rules.eos, rules.on_eos),
        ):
            place = find_end(text.ids, ends, stop)
            if place >= 0:
                last[kind] = place
                if option == "all" or (option == "turn" and visit.trained):
                    trained[place] = True
    for kind, option in (("eot", rules.on_eot), ("eos", rules.on_eos)):
        if option == "last" and last[kind] >= 0:
            trained[last[kind]] = True
    return trained


def untrained_ends(
    rules: TrainRules, visits: Sequence[Visit], text: Located, trained: Mask
) -> Counter[str]:
    """Count the trained turns that end in a token which is not trained, as no option names it."""
    notes: Counter[str] = Counter()
    for visit in visits:
        if not visit.trained or visit.span is None or "none" in (rules.on_eos, rules.on_eot):
            continue
        stop = span_tokens(text, visit.span).stop
        near = range(stop, min(stop + NEAR + 1, len(text.ids)))
        end = next((token for token in near if int(text.ids[token]) in rules.control), None)
        if end is not None and not trained[end] and not is_end(rules, int(text.ids[end])):
            shown = rules.control[int(text.ids[end])]
            notes[
                f'trained turns before "{shown}", which is not trained; add it to eot_tokens'
            ] += 1
    return notes


def is_end(rules: TrainRules, token: int) -> bool:
    """Return whether the options name a token as an end."""
    return token in rules.eos or token in rules.eot


def find_end(ids: Ids, ends: frozenset[int], stop: int) -> int:
    """The first of the tokens `ends` from `stop` on, if it is near, else -1.

    For a turn that has no tokens (`stop` = -1) Axolotl looks at the conversation's last token, and
    gives up if that is one, and else looks at the first three.
    """
    if stop < 0 and int(ids[-1]) in ends:
        return -1
    near = range(max(stop, 0), min(stop + NEAR + 1, len(ids)))
    return next((place for place in near if int(ids[place]) in ends), -1)


def detail_tokens(located: Located, length: int, details: Detail) -> list[int]:
    """The tokens of a content that lie in its trained parts, each part grown to whole tokens.

    Args:
        length: characters of the content.
        details: `begin_offset` and `end_offset` (inclusive) in characters, and `train`.
    """
    starts = located.starts.tolist()
    ends = [*(start - 1 for start in starts[1:]), length - 1]
    try:
        grown = [
            (grow(starts, ends, detail["begin_offset"], detail["end_offset"]), detail["train"])
            for detail in details
        ]
    except (KeyError, TypeError) as error:
        wanted = f"needs begin_offset, end_offset and train ({error})"
        raise RowError("broken training detail", wanted) from None
    return [
        token
        for token, (start, end) in enumerate(zip(starts, ends, strict=True))
        if any(train and part and start >= part[0] and end <= part[1] for part, train in grown)
    ]


def grow(starts: list[int], ends: list[int], begin: int, end: int) -> Span | None:
    """Characters [begin, end] grown to those of whole tokens; None where there is no token."""
    count = len(starts)
    first = next((token for token in range(count) if starts[token] >= begin), count)
    if first and ends[first - 1] > begin:
        first -= 1
    last = next((token for token in reversed(range(count)) if ends[token] <= end), -1)
    if last < count - 1 and starts[last + 1] < end:
        last += 1
    return (starts[first], ends[last]) if first <= last else None
