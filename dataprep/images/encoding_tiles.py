"""Tiles to the bytes that shards hold."""

import io

from PIL import Image

from headrace.schemas.prepare.images_config import ImagesConfig

OPTIONS = {  # the options of Pillow that decide the bytes; measured in docs/images.md
    "png": {"compress_level": 3},
    "webp": {"lossless": True, "quality": 50, "method": 2, "exact": True},
    "jpeg": {"subsampling": 0},
}


def encode_tile(image: Image.Image, config: ImagesConfig) -> bytes:
    """Return a tile as a file: without loss as PNG or WebP, or as JPEG of a quality."""
    target = io.BytesIO()
    options: dict[str, object] = dict(OPTIONS[config.encoding])
    if config.encoding == "jpeg":
        options["quality"] = config.jpeg_quality
    image.save(target, config.encoding.upper(), **options)
    return target.getvalue()
