"""Chat templates that write a token for each picture, and its expansion to those it fills."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.dataprep.images.picture_places import PLACE
from headrace.dataprep.text.chat_mask import RenderedChat, Turn
from headrace.dataprep.text.chat_template import ChatTemplate
from headrace.dataprep.text.rendering import Message, Rendering, Span, TemplateRefusedError
from headrace.dataprep.text.tokens import Located
from headrace.schemas.errors import DataError

WORDS = ("alder", "birch", "cedar")  # of a conversation that tells how a template takes pictures
STYLES = ("mixed", "parts", "text")


class PictureTemplate(ChatTemplate):
    """A template over messages whose contents have places of pictures in them.

    Contents with a picture become lists of parts; all contents do where the template takes no
    other, and where it takes texts alone, the marker stands in them.

    Args:
        marker: the token that the template writes for a picture.
    """

    def __init__(self, marker: str, *template: Any) -> None:
        super().__init__(*template)
        self.marker = marker
        self.style = self.find_style()

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, ask: bool = False
    ) -> Rendering:
        """One conversation as text, with a marker for each picture."""
        return super().render([self.shaped(message) for message in messages], tools, ask)

    def find_style(self) -> str:
        """Return how the template takes pictures.

        Raises:
            DataError: it writes none.
        """
        first, second, answer = WORDS
        messages = [
            {"role": "user", "content": f"{first}{PLACE}{second}"},
            {"role": "assistant", "content": answer},
        ]
        for style in STYLES:
            self.style = style
            try:
                text = self.render(messages).text
            except TemplateRefusedError:
                continue
            if text.count(self.marker) == 1 and all(word in text for word in WORDS):
                return style
        raise DataError(
            f"{self.name}: writes no {self.marker} for a picture in a message; set template in "
            "[sources.chat] to one that does"
        )

    def shaped(self, message: Message) -> Message:
        """Return a message with its content as the template takes it."""
        content = message.get("content")
        if not isinstance(content, str):
            return message
        if self.style == "text":
            return message | {"content": content.replace(PLACE, self.marker)}
        if self.style == "mixed" and PLACE not in content:
            return message
        return message | {"content": list(as_parts(content))}


def as_parts(content: str) -> list[dict[str, str]]:
    """Return a content as parts of text and pictures."""
    texts = content.split(PLACE)
    parts: list[dict[str, str]] = []
    for number, text in enumerate(texts):
        if number:
            parts.append({"type": "image"})
        if text or len(texts) == 1:
            parts.append({"type": "text", "text": text})
    return parts


class Expansion:
    """A text with other texts in place of its markers, and where its characters are then."""

    def __init__(self, text: str, marker: str, texts: Sequence[str]) -> None:
        pieces = text.split(marker)
        self.starts: list[int] = []  # of markers
        self.spans: list[Span] = []  # of what is in place of them
        self.gained = [0]
        self.width = len(marker)
        at, parts = len(pieces[0]), [pieces[0]]
        for piece, inner in zip(pieces[1:], texts, strict=True):
            self.starts.append(at)
            begin = at + self.gained[-1]
            self.spans.append((begin, begin + len(inner)))
            self.gained.append(self.gained[-1] + len(inner) - self.width)
            at += self.width + len(piece)
            parts += [inner, piece]
        self.text = "".join(parts)

    def place(self, old: int) -> int:
        """Return where a character is; of one in a marker, the start of what is in its place."""
        count = bisect_right(self.starts, old)
        if count and old < self.starts[count - 1] + self.width:
            return self.spans[count - 1][0]
        return old + self.gained[count]

    def before(self, found: Located) -> Located:
        """Return tokens of the text with the characters that they had: those of a picture's text
        have its marker's.
        """
        begins = np.array([span[0] for span in self.spans], np.int64)
        ends = np.array([span[1] for span in self.spans], np.int64)
        marks, gained = np.array([*self.starts, 0]), np.array(self.gained)
        inside = np.searchsorted(begins, found.starts, side="right")
        within = (inside > 0) & (found.starts < np.append(0, ends)[inside])
        starts = np.where(within, marks[inside - 1], found.starts - gained[inside])
        after = np.searchsorted(begins, found.ends, side="left")
        touches = (after > 0) & (found.ends <= np.append(0, ends)[after])
        stops = np.where(touches, marks[after - 1] + self.width, found.ends - gained[after])
        return Located(found.ids, starts.astype(np.int32), stops.astype(np.int32))

    def span(self, old: Span) -> Span:
        """Return where characters are."""
        return self.place(old[0]), self.place(old[1])

    def turn(self, old: Turn | None) -> Turn | None:
        """Return a turn of the text."""
        if old is None:
            return None
        return old._replace(
            parts=[self.span(part) for part in old.parts], body_end=self.place(old.body_end)
        )


def expand_pictures(
    chat: RenderedChat, marker: str, texts: Sequence[str]
) -> tuple[RenderedChat, list[Span]]:
    """Return a rendered chat with the texts of its pictures in place of their markers, and where
    these are.

    Raises:
        ValueError: not as many markers as texts.
    """
    found = chat.text.count(marker)
    if found != len(texts):
        raise ValueError(f"{found} times {marker} for {len(texts)} pictures")
    expansion = Expansion(chat.text, marker, texts)
    begins = [None if begin is None else expansion.place(begin) for begin in chat.begins]
    turns = [expansion.turn(turn) for turn in chat.turns]
    generated = [expansion.span(span) for span in chat.generated]
    return RenderedChat(expansion.text, turns, begins, generated), expansion.spans


def open_template(marker: str | None, *template: Any) -> ChatTemplate:
    """Return a compiled template, over messages with pictures if there is a marker."""
    return ChatTemplate(*template) if marker is None else PictureTemplate(marker, *template)
