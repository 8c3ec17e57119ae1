"""Rows of chat data in the shapes that are about, to one list of messages."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from headrace.dataprep.images.picture_places import PicturePlaces
from headrace.dataprep.images.references import Reference, row_references
from headrace.dataprep.text.rendering import Message
from headrace.dataprep.text.special_pieces import unmarked
from headrace.dataprep.text.template_environment import RESERVED
from headrace.schemas.fingerprint import canonical_json
from headrace.schemas.outside_text import json_type
from headrace.schemas.prepare.chat_config import ChatConfig

FIELDS = ("messages", "conversations", "conversation")
ROLES = {  # as ShareGPT and its like name them
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
ROLE_FIELDS = ("role", "from")
CONTENT_FIELDS = ("content", "value")
FLAGS = ("train", "weight")
LABELS = {"true": True, "1": True, "false": False, "0": False}  # CSV has texts


class ConversationError(Exception):
    """A row that is no conversation: the reason, and what is wrong with this one."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Conversation(NamedTuple):
    """Messages as templates take them, for each whether it says itself that it is trained, the
    tools, whether special tokens in them are marked as text, its content once that is known, and
    the pictures in the order of their places."""

    messages: list[Message]
    flags: list[bool | None]
    tools: list[Any] | None
    marked: bool = False
    written: str | None = None
    pictures: tuple[Reference, ...] = ()

    def content(self) -> str:
        """One text for equal conversations; marks of special tokens are none of it."""
        if self.written is not None:
            return self.written
        content = canonical_json([self.messages, self.flags, self.tools])
        return unmarked(content) if self.marked else content


def read_conversation(
    fields: Mapping[str, Any], chat: ChatConfig, pictured: bool = False
) -> Conversation:
    """The conversation of one row.

    Args:
        pictured: whether pictures are read; otherwise a row with some is refused.

    Raises:
        ConversationError: there is none.
        PictureError: its pictures have no places, or the like.
    """
    places = PicturePlaces(row_references(fields, chat.images)) if pictured else None
    names = [chat.field] if chat.field else FIELDS
    name = next((name for name in names if fields.get(name) is not None), None)
    value = fields[name] if name is not None else exchange(fields, chat)
    if value is None:
        raise ConversationError("missing field", f"no field {' or '.join(map(quoted, names))}")
    messages, flags = read_messages(value, chat.roles, name or chat.prompt, places)
    system = fields.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages, flags = [{"role": "system", "content": system}, *messages], [None, *flags]
    if places is not None:
        places.settle(messages)
    found = () if places is None else tuple(places.found)
    tools = read_tools(fields.get("tools"))
    return checked(Conversation(messages, flags, tools, pictures=found))


def exchange(fields: Mapping[str, Any], chat: ChatConfig) -> list[Any] | None:
    """Return a question and its answer as messages, or None where a row has not both."""
    sides = ((chat.prompt, "user"), (chat.completion, "assistant"))
    if any(fields.get(name) is None for name, _ in sides):
        return None
    given = dict(fields) | {chat.prompt: whole_prompt(fields, chat)}
    return [message for name, role in sides for message in side_messages(given[name], role, name)]


def whole_prompt(fields: Mapping[str, Any], chat: ChatConfig) -> Any:
    """Return the question with what it is about, if the config and the row name such a text."""
    prompt = fields[chat.prompt]
    about = fields.get(chat.prompt_input) if chat.prompt_input else None
    if about in (None, ""):
        return prompt
    if not (isinstance(prompt, str) and isinstance(about, str)):
        raise ConversationError(
            "not a conversation", f'fields "{chat.prompt}" and "{chat.prompt_input}" are not texts'
        )
    return f"{prompt}\n{about}" if prompt else about


def side_messages(value: object, role: str, name: str) -> list[Any]:
    """Return a text as a message of a role, messages as they are."""
    parsed = parse_json(value)
    if isinstance(parsed, list) and all(isinstance(item, dict) for item in parsed):
        return parsed
    if not isinstance(value, str):
        raise ConversationError("not a conversation", f'field "{name}" is {json_type(value)}')
    return [{"role": role, "content": value}]


def checked(conversation: Conversation) -> Conversation:
    """A conversation without the characters that mark places in it."""
    content = conversation.content()
    for character in () if content.isascii() else RESERVED:
        if character in content:
            raise ConversationError("reserved character", f"U+{ord(character):04X} is no text")
    return conversation._replace(written=content)


def read_messages(
    value: object, roles: Mapping[str, str], name: str, places: PicturePlaces | None = None
) -> tuple[list[Message], list[bool | None]]:
    """Messages and their own marks of training.

    Args:
        roles: further names of roles.
        name: what error messages call the list.
        places: takes the pictures; None: there must be none.

    Raises:
        ConversationError: it is no list of messages.
    """
    value = in_rows(parse_json(value))
    if not isinstance(value, list):
        raise ConversationError("not a conversation", f'field "{name}" is {json_type(value)}')
    if not value:
        raise ConversationError("not a conversation", f'field "{name}" is an empty list')
    known = ROLES | dict(roles)
    read = [read_message(m, known, f"{name}[{i}]", places) for i, m in enumerate(value)]
    return [message for message, _ in read], [flag for _, flag in read]


def in_rows(value: object) -> object:
    """Return an object of equally long lists, as `datasets` once wrote a list of objects, as that
    list; anything else as it is."""
    if not isinstance(value, dict) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) for column in columns) or len({*map(len, columns)}) > 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def read_message(
    value: object, roles: Mapping[str, str], where: str, places: PicturePlaces | None = None
) -> tuple[Message, bool | None]:
    """One message, and whether it says itself that it is trained."""
    if not isinstance(value, dict):
        raise ConversationError("not a conversation", f"{where} is {json_type(value)}")
    role, content = value.get("role"), value.get("content")
    plain = places is None and len(value) == 2  # as most are
    if plain and isinstance(role, str) and isinstance(content, str):
        return {"role": roles.get(role, role), "content": content}, None
    message = without_none(value)
    flag = read_flag({name: message.pop(name) for name in FLAGS if name in message}, where)
    message = expand_single(message)
    role = take(message, ROLE_FIELDS)
    if not isinstance(role, str):
        raise ConversationError("not a conversation", f'{where} has no "role"')
    content = take(message, CONTENT_FIELDS)
    result: Message = {"role": roles.get(role, role)}
    if content is not None:
        result["content"] = read_content(content, where, places)
    if "tool_calls" in message:
        message["tool_calls"] = read_calls(message["tool_calls"], where)
    if result.keys() | message.keys() == {"role"}:
        raise ConversationError("not a conversation", f'{where} has no "content"')
    return result | message, flag


def expand_single(message: Message) -> Message:
    """`{"user": text}` as `{"role": "user", "content": text}`."""
    if len(message) != 1 or message.keys() & {*ROLE_FIELDS, *CONTENT_FIELDS}:
        return message
    ((role, content),) = message.items()
    return {"role": role, "content": content}


def take(message: Message, names: tuple[str, ...]) -> Any:
    """The first of some fields, which goes out of the message."""
    name = next((name for name in names if name in message), None)
    return None if name is None else message.pop(name)


def read_flag(flags: Mapping[str, object], where: str) -> bool | None:
    """`train` or `weight` of a message."""
    for name, value in flags.items():
        if value not in (0, 1):
            raise ConversationError("not a conversation", f'{where}: "{name}" is neither 0 nor 1')
        return bool(value)
    return None


def read_content(content: object, where: str, places: PicturePlaces | None = None) -> str:
    """A text, or the texts of a list of parts one after another, with places for pictures."""
    parts = content if isinstance(content, list) else [content]
    if places is not None:
        parts = places.read(content, where)
    return "".join(read_part(part, where) for part in parts)


def read_part(part: object, where: str) -> str:
    """A text, or the text of a part."""
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, dict) else None
    seen = f"of type {quoted(kind)}" if isinstance(kind, str) else json_type(part)
    raise ConversationError("content is not text", f"{where}: its content is {seen}")


def read_tools(value: object) -> list[Any] | None:
    """The tools of a row; no tools at all if the list is empty."""
    tools = parse_json(value)
    if tools is None or tools in ([], ""):
        return None
    if not isinstance(tools, list):
        raise ConversationError("tools are no list", f'field "tools" is {json_type(tools)}')
    return [without_none(parse_json(tool)) for tool in tools]


def read_calls(value: object, where: str) -> list[Any]:
    """The tool calls of a message: a list, JSON text of one, or a single call."""
    calls = parse_json(value) or []
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ConversationError(
            "not a conversation", f"{where}: its tool_calls are {json_type(calls)}, not objects"
        )
    return [parse_arguments(without_none(call)) for call in calls]


def parse_arguments(calls: object) -> object:
    """Tool calls with arguments as values, where they are written as JSON."""
    if isinstance(calls, list):
        return [parse_arguments(call) for call in calls]
    if isinstance(calls, dict):
        return {
            name: parse_table(value) if name == "arguments" else parse_arguments(value)
            for name, value in calls.items()
        }
    return calls


def parse_table(value: object) -> object:
    """The value of a JSON text; a table keeps the text."""
    parsed = parse_json(value)
    if isinstance(value, str) and isinstance(parsed, dict):
        table = Parsed(parsed)
        table.text = value
        return table
    return parsed


def arguments_as_text(messages: list[Message]) -> list[Message]:
    """Messages whose tool calls have their arguments as JSON text, for templates that want it."""
    return [
        message | {"tool_calls": write_arguments(message["tool_calls"])}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def with_null_contents(messages: list[Message]) -> list[Message] | None:
    """Messages in which those with tool calls and no content have one of None, or None if there is
    no such message."""
    if not any("tool_calls" in message and "content" not in message for message in messages):
        return None
    return [{"content": None} | m if "tool_calls" in m else m for m in messages]


def write_arguments(calls: object) -> object:
    """Tool calls with arguments as text: as the row has it, else as JSON."""
    if isinstance(calls, list):
        return [write_arguments(call) for call in calls]
    if isinstance(calls, dict):
        return {
            name: write_table(value) if name == "arguments" else write_arguments(value)
            for name, value in calls.items()
        }
    return calls


def write_table(value: object) -> object:
    """A table or list as JSON; anything else as it is."""
    if isinstance(value, Parsed):
        return value.text
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


class Parsed(dict[str, Any]):
    """A table that a row has as text, with that text."""

    text: str = ""


def prints_tables(messages: list[Message], text: str) -> bool:
    """Return whether a rendering shows arguments of a tool call as Python writes a table, because
    the template takes them for text."""
    return any(
        shown in text and shown != json.dumps(table, ensure_ascii=False)
        for message in messages
        for table in tables(message.get("tool_calls"))
        if (shown := str(dict(table))) != "{}"
    )


def tables(calls: object) -> list[dict[str, Any]]:
    """The arguments of some tool calls that are tables."""
    if isinstance(calls, list):
        return [table for call in calls for table in tables(call)]
    if not isinstance(calls, dict):
        return []
    own = calls.get("arguments")
    return [own] if isinstance(own, dict) else tables(calls.get("function"))


def parse_json(value: object) -> object:
    """The value that a string holds as a JSON list or object; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def without_none(value: Any) -> Any:
    """A value less its fields of None: Arrow's structs have every field that some row has."""
    if isinstance(value, dict):
        return {name: without_none(field) for name, field in value.items() if field is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def quoted(name: object) -> str:
    """A name as messages show it."""
    return f'"{name}"'


def read_label(fields: Mapping[str, Any], name: str) -> bool:
    """Return whether an answer is desirable: true or false, 1 or 0, or these as text.

    Raises:
        ConversationError: the field says neither.
    """
    value = fields.get(name)
    if value is None:
        raise ConversationError("missing field", f"no field {quoted(name)}")
    found = LABELS.get(str(value).strip().lower())
    if found is None or isinstance(value, float):
        seen = f"{value!r:.40}" if isinstance(value, str | int | float) else json_type(value)
        raise ConversationError("no label", f"field {quoted(name)} is {seen}, not true or false")
    return found
