"""Steps of image processors over Pillow's images, pixel for pixel those of transformers."""

from collections.abc import Iterator, Mapping

from PIL import Image

from headrace.schemas.errors import ConfigError

Size = tuple[int, int]  # width, height
Color = tuple[int, int, int]
BLACK = (0, 0, 0)


def resize(image: Image.Image, size: Size, resample: int) -> Image.Image:
    """Return an image of another size, its aspect ratio as may be."""
    return image.resize(size, Image.Resampling(resample))


def target_size(size: Size, edges: Mapping[str, int]) -> Size:
    """Return the size that an image is resized to: a fixed one, or one with a given shortest edge.

    Raises:
        ConfigError: edges of another kind.
    """
    if {*edges} == {"height", "width"}:
        return edges["width"], edges["height"]
    if {*edges} != {"shortest_edge"}:
        raise ConfigError(f"images: a processor's size of {dict(edges)} is not supported")
    width, height = size
    short = edges["shortest_edge"]
    long = int(short * max(size) / min(size))
    return (short, long) if width <= height else (long, short)


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """Return the middle of an image; black where the image does not reach."""
    left, top = ((own - wanted) // 2 for own, wanted in zip(image.size, size, strict=True))
    return image.crop((left, top, left + size[0], top + size[1]))


def padded(image: Image.Image, size: Size, color: Color = BLACK) -> Image.Image:
    """Return an image in the middle of a larger one."""
    if image.size == size:
        return image
    canvas = Image.new("RGB", size, color)
    places = [(wanted - own) // 2 for own, wanted in zip(image.size, size, strict=True)]
    canvas.paste(image, (places[0], places[1]))
    return canvas


def cut(image: Image.Image, tile: Size) -> Iterator[Image.Image]:
    """Yield the tiles of an image, row by row; those at its ends may be smaller."""
    width, height = image.size
    for top in range(0, height, tile[1]):
        for left in range(0, width, tile[0]):
            yield image.crop((left, top, min(left + tile[0], width), min(top + tile[1], height)))
