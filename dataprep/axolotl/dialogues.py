"""Conversations with a layout of their own: pygmalion, llama2_chat, messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from headrace.dataprep.axolotl.prompts import prompt_texts
from headrace.dataprep.axolotl.strategy import (
    Built,
    Plan,
    Row,
    RowError,
    TokenRules,
    as_mask,
    as_number,
    as_text,
    column,
    one_sample,
    rows_in,
)
from headrace.dataprep.text.sample import Sample
from headrace.dataprep.text.tokenizer import open_tokenizer
from headrace.dataprep.text.tokens import Located
from headrace.schemas.outside_text import json_type

START = "\n<START>"
TURN_END = " </s><s>"
LLAMA2_BRACKETS = ((29961, "["), (518, "▁["))  # ids of `[` after a letter and at a word's start


@dataclass(frozen=True)
class Pygmalion:
    """Persona, user and model turns, each tokenized apart; what the model says is trained."""

    rules: TokenRules
    located: bool = False

    def plan(self, row: Row) -> Plan:
        """The turns with their prefixes."""
        turns = [
            (column(turn, "role"), as_text(column(turn, "value"), "value"))
            for turn in rows_in(row, "conversations")
        ]
        texts = [self.text(role, value) for role, value in turns]

        def build(found: list[Located]) -> Built:
            prefix = self.strip(self.rules.own(found[0].ids, self.rules.sequence_len)[0])
            ids: list[int] = []
            trained: list[bool] = []
            cut = 0
            for (role, _), part in zip(turns, found[1:], strict=True):
                turn, lost = self.turn(role, part)
                ids += turn
                trained += [role == "bot" and place >= len(prefix) for place in range(len(turn))]
                cut += lost
            return one_sample(ids, trained, cut)

        return Plan(["<|model|>", *texts], build)

    def text(self, role: object, value: str) -> str:
        """One turn as it is written."""
        match role:
            case "system":
                return f"<|system|>Persona: {value.removesuffix(START).strip()}"
            case "human":
                return f"<|user|> {value.strip()}"
            case "bot":
                return f"<|model|> {value.strip()}"
        raise RowError("unknown role", f'role "{role}" is none of: system, human, bot')

    def turn(self, role: object, part: Located) -> tuple[list[int], int]:
        """One turn's ids: BOS stays before the persona only, EOS ends the model's turns."""
        ids, cut = self.rules.own(part.ids, self.rules.sequence_len)
        if (
            role == "bot"
            and ids[-1:] != [self.rules.need_eos()]
            and len(ids) < self.rules.sequence_len
        ):
            ids.append(self.rules.need_eos())
        return (ids if role == "system" else self.strip(ids)), cut

    def strip(self, ids: list[int]) -> list[int]:
        """Ids without the BOS that begins them."""
        return ids[1:] if ids and ids[0] == self.rules.bos else ids


@dataclass(frozen=True)
class Llama2Chat:
    """Llama 2's layout as one text; the mask counts tokens as that tokenizer makes them.

    Where its counts do not fit, nothing is trained.
    """

    rules: TokenRules
    located: bool = False

    def plan(self, row: Row) -> Plan:
        """The conversation, and each exchange with its question alone."""
        text = self.conversation(rows_in(row, "conversations"))
        exchanges = []
        for exchange in text.split(TURN_END):
            parts = exchange.split("[/INST]")
            if len(parts) != 2:
                break
            exchanges += [exchange, parts[0] + "[/INST]"]
        return Plan([text, *exchanges], self.build)

    def conversation(self, turns: Sequence[Row]) -> str:
        """The whole text; a question that comes last is left out."""
        system = prompt_texts()["llama2_chat"]["system"]
        if turns and turns[0].get("from") == "system":
            system = f"[INST] <<SYS>>\n{column(turns[0], 'value')}\n<</SYS>>\n\n"
            turns = turns[1:]
        if len(turns) < 2:
            raise RowError("too few turns", f"{len(turns)} besides the system's, needs two")
        if column(turns[0], "from") == "gpt":
            turns = turns[1:]
        said: list[tuple[str, str]] = []
        for number, turn in enumerate(turns):
            wanted = ("human", "gpt")[number % 2]
            if column(turn, "from") != wanted:
                raise RowError("roles do not alternate", f"turn {number} is not from {wanted}")
            if value := as_text(column(turn, "value"), "value"):
                said.append((wanted, value))
        return system_and_turns(system, said)

    def build(self, found: list[Located]) -> Built:
        """Ids cut to `sequence_len`, answers trained."""
        ids, cut = self.rules.own(found[0].ids, self.rules.sequence_len)
        lengths = [len(self.rules.own(part.ids)[0]) for part in found[1:]]
        trained = np.ones(len(ids), np.bool_)
        place = 1
        trained[:place] = False
        for turn, question in zip(lengths[::2], lengths[1::2], strict=True):
            trained[place - 1 : place + question - 1] = False
            place += turn + 2
        trained[place:] = False
        special = dict(self.rules.spec.special_tokens)
        total = sum(token != special.get("pad") for token in ids)
        if place < self.rules.sequence_len and place != total:
            trained[:] = False
        return one_sample(self.brackets(ids, total), trained, cut)

    def brackets(self, ids: list[int], total: int) -> list[int]:
        """Write inner `[` as at the start of a word, where the vocabulary is Llama 2's."""
        tokenizer = open_tokenizer(self.rules.spec, True)
        if any(tokenizer.id_to_token(token) != text for token, text in LLAMA2_BRACKETS):
            return ids
        (inner, _), (start, _) = LLAMA2_BRACKETS
        return [
            start if token == inner and 2 <= place < total - 2 else token
            for place, token in enumerate(ids)
        ]


def system_and_turns(system: str, said: list[tuple[str, str]]) -> str:
    """Turns between their separators; the first has the system text in place of a role."""
    text = ""
    for number, (role, value) in enumerate(said):
        if number == len(said) - 1 and role == "human":
            return text
        mark = "[INST]" if role == "human" else "[/INST]"
        end = (" ", TURN_END)[number % 2]
        text += f"{mark} {value.strip()}{end}" if number else system + value.strip()
    return text


MESSAGE_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "ipython": "ipython",
}


@dataclass(frozen=True)
class Messages:
    """`messages`: ChatML or Llama 3 headers, each message tokenized as its text grows.

    `fields` lists, for role, content and weight, the names to look for in a first message.
    """

    rules: TokenRules
    field_messages: str
    fields: Mapping[str, Sequence[str]]
    llama3: bool
    located: bool = False

    def plan(self, row: Row) -> Plan:
        """Every message, in the stages in which it is tokenized."""
        messages = rows_in(row, self.field_messages)
        if not messages:
            raise RowError("no messages", f'field "{self.field_messages}" is an empty list')
        names = {key: first_of(messages[0], found) for key, found in self.fields.items()}
        role_name, content_name = names["role"], names["content"]
        if role_name is None or content_name is None:
            raise RowError("missing field", "the first message has no role or no content")
        stages: list[list[tuple[str, bool]]] = []
        for place, message in enumerate(messages):
            role = MESSAGE_ROLES.get(str(column(message, role_name)))
            if role is None:
                raise RowError("unknown role", f'role "{message[role_name]}"')
            weight = role == "assistant" or self.rules.train_on_inputs
            if names["weight"] is not None:
                weight = as_number(column(message, names["weight"]), names["weight"]) != 0
            parts = contents(message, content_name)
            stages.append(growing(self.layout(role, parts, weight, place), weight))
        texts = [text for message in stages for text, _ in message]

        def build(found: list[Located]) -> Built:
            rest = iter(found)
            ids: list[int] = []
            trained: list[bool] = []
            for message in stages:
                grown = [(next(rest).ids.tolist(), weight) for _, weight in message]
                more, mask = join_stages(grown)
                ids += more
                trained += mask
            return Built([Sample(np.array(ids, dtype=np.int32), as_mask(trained))])

        return Plan(texts, build)

    def layout(
        self, role: str, parts: list[tuple[str, bool]], weight: bool, number: int
    ) -> list[tuple[str, bool]]:
        """A message's parts with header and end, and which are trained."""
        if self.llama3:
            shown = "ipython" if role == "tool" else role
            head = [(f"<|start_header_id|>{shown}<|end_header_id|>\n\n", False)]
            begin = [("<|begin_of_text|>", False)] if number == 0 else []
            return [*begin, *head, *parts, ("<|eot_id|>", weight)]
        head = [(f"<|im_start|>{role}\n", False)]
        return [*head, *parts, ("<|im_end|>", weight), ("\n", False)]


def first_of(message: Row, names: Sequence[str]) -> str | None:
    """The first of some names that a message has."""
    return next((name for name in names if name in message), None)


def contents(message: Row, name: str) -> list[tuple[str, bool]]:
    """The text parts of a message; a part may be left untrained by a weight of 0."""
    value = column(message, name)
    if isinstance(value, str):
        return [(value, True)]
    if not isinstance(value, list):
        raise RowError("not a string", f'field "{name}" is {json_type(value)}')
    return [
        (as_text(column(part, "value"), "value"), part.get("weight") not in (0, 0.0))
        for part in rows_in(message, name)
    ]


def growing(parts: list[tuple[str, bool]], weight: bool) -> list[tuple[str, bool]]:
    """The text up to the end of each part, and whether that part is trained."""
    text = ""
    stages = []
    for part, trained in parts:
        text += part
        stages.append((text, weight and trained))
    return stages


def join_stages(stages: list[tuple[list[int], bool]]) -> tuple[list[int], list[bool]]:
    """Ids and mask of a text whose tokens were counted as it grew, part by part.

    The tokens of a part are taken from the tokenization that has one part more, since the next part
    may have changed the last of them.
    """
    ids: list[int] = []
    trained: list[bool] = []
    pending: list[int] = []
    weight = False
    for tokens, part_weight in stages:
        if pending:
            pending = tokens[len(ids) : len(ids) + len(pending)]
            ids += pending
            trained += [weight] * len(pending)
        pending, weight = tokens[len(ids) :], part_weight
    return ids + pending, trained + [weight] * len(pending)
