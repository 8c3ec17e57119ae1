"""Rows of conversations to the messages that a template reads, and what they say of training."""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from headrace.dataprep.axolotl.prompts import prompt_texts
from headrace.dataprep.axolotl.strategy import Row, RowError, as_text
from headrace.dataprep.text.rendering import Message
from headrace.schemas.errors import ConfigError
from headrace.schemas.outside_text import json_type
from headrace.schemas.prepare.axolotl_config import AxolotlConfig

DEFAULT_ROLES = {
    "human": "user",
    "user": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
}
THOUGHTS = (
    ("<think>", "</think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")
PART_TEXTS = ("text", "content", "value")

Detail = list[dict[str, Any]]


class Turn(NamedTuple):
    """A message as the template sees it; whether it is trained, and which characters of its content
    and of its reasoning, where the row says so."""

    message: Message
    training: bool | None = None
    detail: Detail | None = None
    reasoning_detail: Detail | None = None

    @property
    def role(self) -> object:
        """Return the role of the speaker."""
        return self.message.get("role")


@dataclass(frozen=True)
class TurnReader:
    """Reader of a row's conversation, whatever the names under which the row holds it.

    Args:
        names: the template's names of a message's properties, with the rows' names of them.
        kept: further properties that the template reads, which pass under their own name.
        roles: rows' names of roles.
        sharegpt: leave out a first turn that is not the user's; want at least two.
        jokes: rows are jokes with title, text and explanation.
    """

    field_messages: str = "messages"
    field_tools: str = "tools"
    names: dict[str, str] = field(default_factory=lambda: {"role": "role", "content": "content"})
    kept: frozenset[str] = frozenset()
    roles: dict[str, str] = field(default_factory=lambda: DEFAULT_ROLES)
    thinking_key: str = "reasoning_content"
    split_thinking: bool = False
    field_training: str | None = None
    field_detail: str | None = None
    drop_system_message: bool = False
    sharegpt: bool = False
    jokes: bool = False

    def read(self, row: Row) -> tuple[list[Turn], list[Any] | None]:
        """The turns of a row, and its tools.

        Raises:
            RowError: the row has no conversation.
        """
        row = without_nulls(row)
        found = self.joke(row) if self.jokes else read_messages(row, self.field_messages)
        turns = [self.turn(message) for message in found]
        if "role" not in turns[0].message:
            raise RowError("missing field", f'the first message has no "{self.names["role"]}"')
        if turns[0].role != "system" and "system" in row:
            turns.insert(0, Turn({"role": "system", "content": row["system"]}))
        if self.sharegpt:
            turns = begin_with_user(turns)
        if self.drop_system_message and turns[0].role == "system":
            turns = turns[1:]
        if not turns:
            raise RowError("no messages", "there is nothing but a system message")
        return turns, read_tools(row, self.field_tools)

    def joke(self, row: Row) -> list[Message]:
        """A joke told and explained."""
        texts = prompt_texts()["sharegpt_jokes"]
        missing = next((name for name in ("text", "explanation") if not row.get(name)), None)
        if missing:
            raise RowError("missing field", f'no field "{missing}"')
        title, text, explanation = (
            as_text(row.get(name), name) for name in ("title", "text", "explanation")
        )
        told = f"{title} {text}" if title else text
        said = [texts["ask"], told, texts["explain"], explanation]
        return [
            {self.names["role"]: role, self.names["content"]: text}
            for role, text in zip(("human", "gpt", "human", "gpt"), said, strict=True)
        ]

    def turn(self, message: Message) -> Turn:
        """One message under the template's names."""
        seen = {
            key: message[name] for key, name in self.names.items() if message.get(name) is not None
        }
        if isinstance(role := seen.get("role"), str):
            seen["role"] = self.roles.get(role, role)
        if self.split_thinking and seen.get("role") == "assistant":
            seen |= split_thinking(seen.get("content"), self.thinking_key)
        mapped = set(self.names.values())
        seen |= {
            name: message[name] for name in self.kept - mapped if message.get(name) is not None
        }
        if not isinstance(seen.get("role", ""), str):
            raise RowError("not a string", f"a role is {json_type(seen['role'])}")
        if seen.get("tool_calls"):
            if not isinstance(seen["tool_calls"], list):
                raise RowError("not a list", f'"tool_calls" is {json_type(seen["tool_calls"])}')
            seen["tool_calls"] = [parse_call(call) for call in seen["tool_calls"]]
        training = message.get(self.field_training) if self.field_training else None
        training = None if self.sharegpt and training else training  # a weight of 0 masks, no more
        detail = message.get(self.field_detail) if self.field_detail else None
        seen, detail = join_parts(seen, "content", detail)
        seen, reasoning_detail = join_parts(seen, self.thinking_key, None)
        return Turn(seen, None if training is None else bool(training), detail, reasoning_detail)


def without_nulls(value: Any) -> Any:
    """A value without null properties, which columns of structs have where a row lacks them."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def read_messages(row: Row, name: str) -> list[Message]:
    """The messages of a row: a list, or JSON text of one."""
    if name not in row:
        raise RowError("missing field", f'no field "{name}", or it is null')
    messages = parse_json(row[name], name) if isinstance(row[name], str) else row[name]
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise RowError("not a list of objects", f'field "{name}" is {json_type(messages)}')
    if not messages:
        raise RowError("no messages", f'field "{name}" is an empty list')
    return messages


def read_tools(row: Row, name: str) -> list[Any] | None:
    """The tools of a row, with schemas that are written as text read."""
    tools = row.get(name)
    if isinstance(tools, str):
        tools = parse_json(tools, name)
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise RowError("not a list of objects", f'field "{name}" is {json_type(tools)}')
    return [parse_function(tool, "parameters") for tool in tools]


def parse_call(call: Any) -> Any:
    """A tool call with arguments that are written as text read."""
    return parse_function(call, "arguments")


def parse_function(tool: Any, key: str) -> Any:
    """A tool or a call of one, with one property of its function parsed."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get(key), str):
        return tool
    return {**tool, "function": {**function, key: parse_json(function[key], key)}}


def parse_json(text: str, name: str) -> Any:
    """A JSON value in a string."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError("broken JSON", f'in "{name}": {error}') from None


def split_thinking(content: object, key: str) -> Message:
    """Content and reasoning of a text that holds both."""
    if not isinstance(content, str):
        raise RowError("not a string", f"an assistant's content is {json_type(content)}")
    for begin, end in THOUGHTS:
        if begin in content and end in content:
            thought = content[content.find(begin) + len(begin) : content.find(end)]
            rest = content[content.find(end) + len(end) :].lstrip()
            begin, end = SOLUTION
            if begin in rest and end in rest:
                rest = rest[rest.find(begin) + len(begin) : rest.find(end)].strip()
            return {key: thought.strip(), "content": rest}
    return {}


def join_parts(message: Message, key: str, detail: Any) -> tuple[Message, Detail | None]:
    """A property that is a list of parts as one text; parts may say whether they are trained."""
    if not isinstance(message.get(key), list):
        return message, detail
    parts = [part for part in message[key] if isinstance(part, dict)]
    texts = [next((part[name] for name in PART_TEXTS if part.get(name)), "") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RowError("not a string", f'a part of "{key}" is no text')
    cuts: Detail = []
    offset = 0
    for part, text in zip(parts, texts, strict=True):
        if text:
            end = offset + len(text)
            cuts.append({"begin_offset": offset, "end_offset": end - 1, "train": is_trained(part)})
            offset = end
    explicit = any(part.get(flag) is not None for part in parts for flag in ("train", "weight"))
    return message | {key: "".join(texts)}, cuts if explicit else detail


def is_trained(part: dict[str, Any]) -> bool:
    """Return whether a part of a content is trained; those that do not say are."""
    if part.get("train") is not None:
        return bool(part["train"])
    return part.get("weight") is None or part["weight"] != 0


def begin_with_user(turns: list[Turn]) -> list[Turn]:
    """A ShareGPT conversation: a first turn of anyone but the user is left out."""
    first = int(turns[0].role == "system")
    if len(turns) - first < 2:
        raise RowError("too few turns", f"{len(turns) - first} besides the system's, needs two")
    if turns[first].role != "user":
        return turns[:first] + turns[first + 1 :]
    return turns


def turn_reader(config: AxolotlConfig, kept: frozenset[str]) -> TurnReader:
    """Return the reader of the turns of a row."""
    thinking_key = config.template_thinking_key or "reasoning_content"
    names = {"role": "role", "content": "content"} | property_names(config)
    if config.field_thinking:
        names.setdefault(thinking_key, config.field_thinking)
    roles = DEFAULT_ROLES
    if config.roles:
        roles = {alias: role for role, aliases in config.roles.items() for alias in aliases}
    return TurnReader(
        field_messages=config.field_messages or "messages",
        field_tools=config.field_tools or "tools",
        names=names,
        kept=kept,
        roles=roles,
        thinking_key=thinking_key,
        split_thinking=bool(config.split_thinking),
        field_training=config.message_field_training,
        field_detail=config.message_field_training_detail,
        drop_system_message=bool(config.drop_system_message),
    )


def property_names(config: AxolotlConfig) -> dict[str, str]:
    """The mapping of message properties, with the older names of two of them."""
    mapping = dict(config.message_property_mappings or {})
    for key, old in (
        ("role", config.message_field_role),
        ("content", config.message_field_content),
    ):
        if old is not None and mapping.setdefault(key, old) != old:
            raise ConfigError(
                f'message_field_{key} = "{old}" and message_property_mappings.{key} = '
                f'"{mapping[key]}" differ; remove one'
            )
    return mapping
