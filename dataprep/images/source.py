"""The pictures of rows, prepared: fetched, opened, resized, encoded."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from headrace.dataprep.images.encoding_tiles import encode_tile
from headrace.dataprep.images.families import family_rule
from headrace.dataprep.images.fetching import fetch
from headrace.dataprep.images.opening import open_picture
from headrace.dataprep.images.picture import Picture, PictureError
from headrace.dataprep.images.references import Reference
from headrace.schemas.prepare.images_config import ImagesConfig
from headrace.schemas.vision.processor_record import Processor


class PreparedPictures(NamedTuple):
    """The pictures of a row, the texts in their places, and the SHA-256 of each one's file."""

    pictures: tuple[Picture, ...]
    texts: list[str]
    digests: list[str]


NONE = PreparedPictures((), [], [])


class PictureSource:
    """Prepares the pictures of rows by one processor."""

    def __init__(self, config: ImagesConfig) -> None:
        assert config.identity is not None, "the config is resolved"
        self.config = config
        identity = config.identity
        processor = Processor(str(identity["family"]), identity["settings"])
        self.rule = family_rule(processor)
        self.marker = processor.tokens["marker"]
        self.last: tuple[tuple[Reference, ...], PreparedPictures] = ((), NONE)

    def prepare(self, references: Sequence[Reference]) -> PreparedPictures:
        """Return the pictures of one row; both sides of a pair share them.

        Raises:
            PictureError: too many, or one that cannot be taken, which it names.
        """
        if len(references) > self.config.max_count:
            raise PictureError(
                "too many pictures", f"{len(references)}: max_count = {self.config.max_count}"
            )
        if self.last[0] != tuple(references):
            found = [self.picture(reference) for reference in references]
            pictures = tuple(picture for picture, _, _ in found)
            made = PreparedPictures(pictures, [t for _, t, _ in found], [d for _, _, d in found])
            self.last = (tuple(references), made)
        return self.last[1]

    def picture(self, reference: Reference) -> tuple[Picture, str, str]:
        """Return one picture, the text in its place, and its digest."""
        try:
            data = fetch(reference, self.config)
            image = open_picture(data, self.config)
            prepared = self.rule.prepare(image)
        except PictureError as error:
            raise PictureError(error.reason, f"{name_of(reference)}: {error.detail}") from None
        tiles = tuple(encode_tile(tile, self.config) for tile in prepared.tiles)
        picture = Picture(tiles, prepared.tokens, *image.size)
        return picture, prepared.text, hashlib.sha256(data).hexdigest()


def name_of(reference: Reference) -> str:
    """Return what messages call a picture."""
    if reference.address is None:
        return "a picture in the row"
    address = reference.address
    return "a data URI" if address.startswith("data:") else ascii(Path(address).name)[1:-1][:80]
