"""The places of pictures in the messages of a row: one character stands for each."""

from collections.abc import Sequence
from typing import Any

from headrace.dataprep.images.picture import PictureError
from headrace.dataprep.images.references import (
    MARKER,
    SOURCE_FIELDS,
    Reference,
    is_picture,
    read_reference,
)

PLACE = "\ufdd6"  # no character: stands in a content for a picture


class PicturePlaces:
    """The pictures of one row in the order of their places.

    Args:
        listed: those that the row lists beside its messages; `<image>` in a text takes the next.
    """

    def __init__(self, listed: Sequence[Reference]) -> None:
        self.listed = list(listed)
        self.taken = 0
        self.found: list[Reference] = []

    def read(self, content: object, where: str) -> list[object]:
        """Return a content as texts and other parts, with its pictures as places in texts.

        Raises:
            PictureError: a place without a picture.
        """
        parts = content if isinstance(content, list) else [content]
        if names := named_after(parts):
            text = str(parts[0])
            self.found += [Reference(address=name) for name in names]
            return [checked(text.replace(MARKER, PLACE), len(names))]
        return [self.part(part, where) for part in parts]

    def part(self, part: object, where: str) -> object:
        """Return a text with places, the place of a picture, or a part as it is."""
        if isinstance(part, str):
            return self.text(part)
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return self.text(part["text"])
        if not is_picture(part):
            return part
        assert isinstance(part, dict)
        if any(part.get(name) is not None for name in SOURCE_FIELDS):
            self.found.append(read_reference(part, where))
        else:
            self.next()
        return PLACE

    def text(self, text: str) -> str:
        """Return a text in which each `<image>` is the place of the next picture."""
        checked(text, 0)
        for _ in range(text.count(MARKER)):
            self.next()
        return text.replace(MARKER, PLACE)

    def next(self) -> None:
        """Take the next picture of the row."""
        if self.taken >= len(self.listed):
            raise PictureError(
                "place without a picture", f"the row lists {len(self.listed)} pictures, too few"
            )
        self.found.append(self.listed[self.taken])
        self.taken += 1

    def settle(self, messages: list[dict[str, Any]]) -> None:
        """Put the pictures of a row that has no places before its first question.

        Raises:
            PictureError: some pictures have a place and others do not.
        """
        left = self.listed[self.taken :]
        if not left:
            return
        if self.found:
            raise PictureError(
                "picture without a place",
                f"the row lists {len(self.listed)} pictures, and has {self.taken} places for them",
            )
        first = next((m for m in messages if m.get("role") == "user"), None)
        if first is None:
            raise PictureError("picture without a place", "no message of a user")
        first["content"] = PLACE * len(left) + str(first.get("content") or "")
        self.found += left


def named_after(parts: Sequence[object]) -> list[str]:
    """Return the names that follow a text with as many `<image>`, as in jllm's rows."""
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts) or len(texts) < 2 or any(MARKER in text for text in texts[1:]):
        return []
    return texts[1:] if texts[0].count(MARKER) == len(texts) - 1 else []


def checked(text: str, places: int) -> str:
    """Return a text that holds so many places, and no other."""
    if text.count(PLACE) != places:
        raise PictureError("reserved character", f"U+{ord(PLACE):04X} is no text")
    return text
