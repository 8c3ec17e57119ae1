"""Special tokens in the texts of a conversation, marked so that they stay text."""

import re
from typing import Any

from headrace.dataprep.text.conversation import Conversation, ConversationError, Parsed
from headrace.dataprep.text.special_pieces import MARK, NAMELESS, mark_text

ESCAPED = MARK.encode("ascii", "backslashreplace").decode()  # as JSON and Python write it


def mark_conversation(conversation: Conversation, pattern: re.Pattern[str]) -> Conversation:
    """Return a conversation in whose texts no special token is found.

    Raises:
        ConversationError: there are marks in it already.
    """
    content = conversation.content()
    for character in (MARK, NAMELESS):
        if character in content:
            raise ConversationError("reserved character", f"U+{ord(character):04X} is no text")
    messages, tools = marked([conversation.messages, conversation.tools], pattern)
    return conversation._replace(messages=messages, tools=tools, marked=True)


def marked(value: Any, pattern: re.Pattern[str]) -> Any:
    """Return a value with marks in all its texts; names of fields stay."""
    if isinstance(value, str):
        return mark_text(value, pattern)
    if isinstance(value, list):
        return [marked(item, pattern) for item in value]
    if not isinstance(value, dict):
        return value
    table = {name: marked(item, pattern) for name, item in value.items()}
    if not isinstance(value, Parsed):
        return table
    parsed = Parsed(table)
    parsed.text = mark_text(value.text, pattern)
    return parsed


def check_marks(text: str) -> None:
    """Refuse a rendering in which a mark is written as an escape.

    Raises:
        ConversationError: it is.
    """
    if ESCAPED in text:
        raise ConversationError(
            "special token in an escape",
            "the chat template writes the text of a special token with escapes, so that it cannot "
            "be kept as text",
        )
