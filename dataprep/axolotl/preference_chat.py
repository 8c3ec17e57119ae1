"""Preference rows through a chat template."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headrace.dataprep.axolotl.preference import Pair, one_pair, refuse_tools, said, string
from headrace.dataprep.axolotl.strategy import Built, Plan, Row, RowError, column, rows_in
from headrace.dataprep.axolotl.turns import TurnReader, parse_call, read_tools
from headrace.dataprep.text.chat_template import ChatTemplate
from headrace.dataprep.text.rendering import Message, TemplateRefusedError
from headrace.dataprep.text.tokens import Located

TOOL_FIELDS = ("tool_calls", "tool_call_id", "name")
DUMMY = {"role": "user", "content": "[[dummy_message]]"}  # a question for templates that want one


@dataclass(frozen=True)
class TemplatePairs:
    """Messages and answers through a chat template; `asking` ends in the answer's header.

    Args:
        names: the template's names of a message's properties, with the rows'.
        roles: rows' names of roles.
        whole: chosen and rejected are whole conversations, which hold the prompt.
    """

    template: ChatTemplate
    asking: ChatTemplate
    names: Mapping[str, str]
    roles: Mapping[str, str]
    field_messages: str
    field_chosen: str
    field_rejected: str
    whole: bool

    def __call__(self, row: Row) -> Pair:
        """The prompt, and each answer as it stands after a question."""
        if self.whole:
            asked = [self.message(turn) for turn in rows_in(row, self.field_chosen)[:-1]]
        elif isinstance(column(row, self.field_messages), str):
            asked = [{"role": "user", "content": row[self.field_messages]}]
        else:
            asked = [self.message(turn) for turn in rows_in(row, self.field_messages)]
        answers = (self.answer(row, name) for name in (self.field_chosen, self.field_rejected))
        prompt = self.asking.render(asked, read_tools(row, "tools")).text
        return Pair(prompt, *map(self.render_answer, answers))

    def answer(self, row: Row, name: str) -> Message:
        """An answer: a text, a message, or the last of several messages."""
        value = column(row, name)
        if isinstance(value, str):
            return {"role": "assistant", "content": value}
        if isinstance(value, dict):
            return self.message(value)
        turns = rows_in(row, name)
        if not turns:
            raise RowError("no messages", f'field "{name}" is an empty list')
        return self.message(turns[-1])

    def message(self, turn: Row) -> Message:
        """One message under the template's names."""
        role = string(turn, self.names["role"])
        if role not in self.roles:
            raise RowError("unknown role", f'role "{role}" is none of: {", ".join(self.roles)}')
        seen = {name: turn[name] for name in TOOL_FIELDS if turn.get(name) is not None}
        if isinstance(seen.get("tool_calls"), list):
            seen["tool_calls"] = [parse_call(call) for call in seen["tool_calls"]]
        content = "" if seen and turn.get(self.names["content"]) is None else None
        content = string(turn, self.names["content"]) if content is None else content
        return {"role": self.roles[role], "content": content} | seen

    def render_answer(self, message: Message) -> str:
        """Render an answer, and return the text from its content on."""
        if message.get("tool_calls"):
            raise RowError("tool calls in an answer", 'use type = "preference", which has them')
        text = self.template.render([DUMMY, message]).text
        start = text.find(message["content"])
        if start < 0 or not message["content"]:
            raise RowError("empty text", "the template does not write the answer as it is")
        return text[start:].rstrip()


@dataclass(frozen=True)
class ArgillaPairs:
    """ORPO's rows: whole conversations whose last message is the answer."""

    template: ChatTemplate
    asking: ChatTemplate

    def __call__(self, row: Row) -> Pair:
        """The prompt, and what each answer adds to it."""
        turns = rows_in(row, "chosen")
        if not turns or len(turns) % 2:
            raise RowError("too few turns", f"{len(turns)} in chosen, needs pairs of them")
        asked: list[Message] = []
        if row.get("system"):
            asked.append({"role": "system", "content": row["system"]})
        for number, turn in enumerate(turns[:-1]):
            refuse_tools(turn)
            content = string(turn, "content")
            if number % 2 == 0 and "prompt" in row:
                content = string(row, "prompt")
            asked.append({"role": ("user", "assistant")[number % 2], "content": content})
        prompt = self.asking.render(asked).text
        answers = (
            self.template.render([*asked, {"role": "assistant", "content": said(row, name, -1)}])
            for name in ("chosen", "rejected")
        )
        return Pair(prompt, *(answer.text[len(prompt) :] for answer in answers))


@dataclass(frozen=True)
class StagedPairs:
    """Conversations whose tokens are counted as they grow: up to the answer, then with it."""

    stages: Callable[[Row, str], list[str]]
    located: bool = False

    def plan(self, row: Row) -> Plan:
        """Each conversation up to the end of each stage; the answer comes last, and is trained."""
        try:
            sides = [self.stages(row, name) for name in ("chosen", "rejected")]
        except TemplateRefusedError as error:
            raise RowError("refused by the chat template", str(error)) from None

        def build(found: list[Located]) -> Built:
            rest = iter(found)
            (chosen, start), (rejected, rejected_start) = (
                grown([next(rest).ids.tolist() for _ in side]) for side in sides
            )
            return one_pair(chosen, start, rejected, rejected_start)

        return Plan([text for side in sides for text in side], build)


def grown(stages: list[list[int]]) -> tuple[list[int], int]:
    """Ids of a text whose tokens were counted as it grew, and where its last stage begins."""
    ids: list[int] = []
    start = 0
    for tokens in stages:
        start = len(ids)
        ids += tokens[start:]
    return ids, start


@dataclass(frozen=True)
class OrpoStages:
    """`orpo.chat_template`: a system text, and question and answer in chosen and in rejected."""

    template: ChatTemplate
    asking: ChatTemplate

    def __call__(self, row: Row, name: str) -> list[str]:
        """The conversation after each message."""
        messages: list[Message] = []
        texts = []
        if row.get("system"):
            messages.append({"role": "system", "content": row["system"]})
            texts.append(self.template.render(messages).text)
        messages.append({"role": "user", "content": said(row, name, 0)})
        texts.append(self.asking.render(messages).text)
        messages.append({"role": "assistant", "content": said(row, name, 1)})
        return [text for text in [*texts, self.template.render(messages).text] if text]


@dataclass(frozen=True)
class BradleyTerryStages:
    """`bradley_terry.chat_template`: a system text, a question, and two answers to it."""

    reader: TurnReader
    template: ChatTemplate
    asking: ChatTemplate

    def __call__(self, row: Row, name: str) -> list[str]:
        """The conversation without and with the answer."""
        refuse_tools(row)
        thread = [
            {"role": "user", "content": string(row, "input")},
            {"role": "assistant", "content": string(row, name)},
        ]
        if row.get("system"):
            thread.insert(0, {"role": "system", "content": row["system"]})
        turns, _ = self.reader.read({**row, self.reader.field_messages: thread})
        messages = [turn.message for turn in turns]
        return [self.asking.render(messages[:-1]).text, self.template.render(messages).text]
