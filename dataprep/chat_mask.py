"""Spans of the turns in a rendered conversation, and the tokens they cover.

A conversation is rendered twice: as it is, and with each content replaced by a mark that occurs
nowhere else. If putting the contents back between the pieces gives the first text, the places are
known. Otherwise, as with templates that look into contents, or with messages that have more than a
content, each turn is rendered once more with the mark alone in its place, and its span is what
differs.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from headrace.dataprep.chat_template import ChatTemplate, Message, Span
from headrace.dataprep.tokenizer import Located

MARK = re.compile("\ufdd2(\\d+)\ufdd3")


class RenderedChat(NamedTuple):
    """A conversation as text; the characters of each turn, None where it has none or more than one
    place; and what the template marks with `{% generation %}`."""

    text: str
    turns: list[Span | None]
    generated: list[Span]


def render_chat(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: list[Any] | None = None,
    wanted: Collection[int] | None = None,
) -> RenderedChat:
    """Render a conversation and find its turns.

    A turn's span is its content as the template writes it, with whatever else of the message stands
    there: reasoning, tool calls.

    Args:
        wanted: the turns to find, by index; the others may come as None. Default: all.

    Raises:
        TemplateRefusedError: the template does not take these messages.
        DataError: the template takes too long, or does what it must not.
    """
    real = template.render(messages, tools)
    turns = locate_all(template, messages, tools, real.text)
    if turns is None:
        turns = [
            locate_turn(template, messages, index, mark_turn(message, index), real.text, tools)
            if wanted is None or index in wanted
            else None
            for index, message in enumerate(messages)
        ]
    return RenderedChat(real.text, turns, real.generated)


def locate_all(
    template: ChatTemplate, messages: Sequence[Message], tools: list[Any] | None, text: str
) -> list[Span | None] | None:
    """The span of each turn by one rendering, or None if it cannot be trusted."""
    if not all(is_plain(message) for message in messages):
        return None
    marked = template.render([mark_turn(m, i) for i, m in enumerate(messages)], tools).text
    first, *parts = MARK.split(marked)
    if not text.startswith(first):
        return None
    spans: list[Span | None] = [None] * len(messages)
    position = len(first)
    for number, following in zip(parts[::2], parts[1::2], strict=True):
        content = messages[int(number)]["content"]
        written = fitting_content(content, text, position, following)
        if written is None or spans[int(number)] is not None:
            return None
        end = position + len(written)
        spans[int(number)] = (position, end) if written else None
        position = end + len(following)
    return spans if position == len(text) else None


def fitting_content(content: str, text: str, position: int, following: str) -> str | None:
    """The content as it stands at a position before what follows it: whole, or trimmed."""
    for written in (content, content.strip(), content.lstrip(), content.rstrip()):
        if text.startswith(written, position) and text.startswith(
            following, position + len(written)
        ):
            return written
    return None


def locate_turn(
    template: ChatTemplate,
    messages: Sequence[Message],
    index: int,
    replacement: Message,
    text: str,
    tools: list[Any] | None = None,
) -> Span | None:
    """Return the span of a rendering that changes when one message is replaced by another."""
    changed = [*messages[:index], replacement, *messages[index + 1 :]]
    other = template.render(changed, tools).text
    start = common_prefix(text, other)
    limit = min(len(text), len(other)) - start
    end = len(text) - min(limit, common_prefix(text[::-1], other[::-1]))
    return (start, end) if end > start else None


def mark_turn(message: Message, index: int) -> Message:
    """A message of the same role with nothing in it but a mark."""
    return {"role": message.get("role"), "content": f"\ufdd2{index}\ufdd3"}


def is_plain(message: Message) -> bool:
    """Return whether a message is only a role and a text."""
    return message.keys() == {"role", "content"} and isinstance(message["content"], str)


def common_prefix(left: str, right: str) -> int:
    """Return the length of the longest common prefix of two texts, by bisection."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def span_tokens(located: Located, span: Span) -> slice:
    """The tokens that have characters of a span, those over its edges included."""
    first = int(np.searchsorted(located.ends, span[0], side="right"))
    return slice(first, max(first, int(np.searchsorted(located.starts, span[1], side="left"))))
