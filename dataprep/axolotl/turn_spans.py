"""Turns as Axolotl finds them: what of a rendering goes away when a message is another one.

Axolotl 0.19.0 renders the whole conversation once more for each turn. Here all turns are replaced
in one rendering, and each is compared with its own text, which gives the same spans; what a
template writes for another message, as a tool's result, is never in them.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from headrace.dataprep.text.chat_mask import (
    differences,
    differing_span,
    mark_content,
    mark_turn,
    render_chat,
)
from headrace.dataprep.text.chat_template import ChatTemplate
from headrace.dataprep.text.rendering import Message, Rendering, Span, TemplateRefusedError


class SpannedChat(NamedTuple):
    """A rendered conversation, and the characters of each turn, None where it has none."""

    rendering: Rendering
    turns: list[Span | None]


def find_spans(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: list[Any] | None,
    wanted: Collection[int],
) -> SpannedChat:
    """Render a conversation and find the turns that are wanted.

    Raises:
        TemplateRefusedError: the template does not take these messages.
        DataError: the template takes too long, or does what it must not.
    """
    rendering = template.render(messages, tools)
    turns: list[Span | None] = [None] * len(messages)
    missing = set(wanted)
    for replace in (mark_turn, mark_content):
        found = differences(template, messages, tools, rendering, missing, replace)
        for index, span in found.items():
            turns[index] = span if span[1] > span[0] else None
        missing -= found.keys()
        if not missing:
            return SpannedChat(rendering, turns)
    generated = render_chat(template, messages, tools, missing)
    for index in missing:
        turn = generated.turns[index]
        if turn is not None and turn.body_end > turn.start:
            turns[index] = (turn.start, turn.body_end)
    return SpannedChat(rendering, turns)


def find_difference(
    template: ChatTemplate,
    messages: Sequence[Message],
    index: int,
    replacement: Message,
    rendering: Rendering,
    tools: list[Any] | None = None,
) -> Span | None:
    """Return what of one turn goes away when it is replaced; None for nothing."""
    found = differences(
        template, messages, tools, rendering, [index], lambda message, number: replacement
    ).get(index)
    if found is None:
        changed = [*messages[:index], replacement, *messages[index + 1 :]]
        try:
            found = differing_span(rendering.text, template.render(changed, tools).text)
        except TemplateRefusedError:
            return None
    return found if found[1] > found[0] else None
