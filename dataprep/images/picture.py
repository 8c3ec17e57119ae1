"""A picture as rows hold it, and the error of one that cannot be taken."""

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL import Image


class PictureError(Exception):
    """A picture that refuses its row: the reason, and what is wrong with this one."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Prepared(NamedTuple):
    """A picture as a vision family takes it.

    `tiles` are what the tower sees, in order; `text` stands for the picture in a rendered chat, and
    holds `tokens` placeholders.
    """

    tiles: "list[Image.Image]"
    text: str
    tokens: int


class Family(Protocol):
    """A rule by which a vision family prepares pictures."""

    def prepare(self, image: "Image.Image") -> Prepared:
        """Return the tiles of an RGB image, and the text that stands for it.

        Raises:
            PictureError: its size is one that the family does not take.
        """
        ...


class Picture(NamedTuple):
    """A prepared picture with its tiles encoded; `width` and `height` are of the whole."""

    tiles: tuple[bytes, ...]
    tokens: int
    width: int
    height: int
