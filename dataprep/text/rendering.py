"""A conversation as a template has written it, and what is asked of a template."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

Message = dict[str, Any]
Span = tuple[int, int]  # characters [start, end) of a rendering

REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateRefusedError(Exception):
    """A template cannot render one conversation, or says so itself.

    `mistyped` tells that a value was of another type than the template takes.
    """

    def __init__(self, message: str, mistyped: bool = False) -> None:
        super().__init__(message)
        self.mistyped = mistyped


class Rendering(NamedTuple):
    """A conversation as text, what the template marks with `{% generation %}`, and for each
    message the stretches of text that were written while a loop of the template was at it."""

    text: str
    generated: list[Span]
    turns: list[list[Span]]


class Template(Protocol):
    """A chat template, of whatever kind."""

    asks: bool  # it has a generation prompt

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, ask: bool = False
    ) -> Rendering:
        """Return a conversation as text, or refuse it, as `ChatTemplate.render` does."""
