"""Bytes to an RGB image: checked before a pixel is unpacked, turned as its camera says."""

import functools
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from headrace.dataprep.images.picture import PictureError
from headrace.schemas.outside_text import shown
from headrace.schemas.prepare.images_config import ImagesConfig

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
STILL = ("MPO",)  # a kind of JPEG, whose further frames are other views of the same photograph
KINDS = {  # what files that are no pictures begin with
    b"<svg": "SVG, which is no raster image",
    b"<?xml": "XML (SVG is no raster image)",
    b"<!doc": "HTML",
    b"<html": "HTML",
    b"%pdf": "PDF",
    b"%!ps": "PostScript",
    b"pk\x03\x04": "a ZIP archive",
    b"version https://git-lfs": "a pointer of Git LFS, not the file",
}
UNKNOWN_PIXELS = ("I", "F")  # modes of 32 bits, whose range is not told
DECODING = (  # raised by Pillow over damaged files
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def open_picture(data: bytes, config: ImagesConfig) -> Image.Image:
    """Return a picture as RGB, as the processors of transformers see it.

    Transparent parts are laid on white, and the camera's orientation is followed.

    Raises:
        PictureError: it is none, damaged, moving, or beyond a limit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd tags
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = identified(data)
        check(image, config)
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return to_rgb(image if upright is None else upright)
        except DECODING as error:
            raise PictureError("damaged picture", reason_of(error)) from None


def identified(data: bytes) -> Image.Image:
    """Return a picture of which only the header is read."""
    try:
        return Image.open(io.BytesIO(data), formats=known_formats())
    except UnidentifiedImageError:
        start = data.lstrip()[:24].lower()
        kind = next((name for mark, name in KINDS.items() if start.startswith(mark)), None)
        raise PictureError(
            "no picture", f"it is {kind}" if kind else f"it begins with {shown(data[:12])}"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError("too many pixels", reason_of(error)) from None
    except DECODING as error:
        raise PictureError("damaged picture", reason_of(error)) from None


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Return the formats that are read and that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check(image: Image.Image, config: ImagesConfig) -> None:
    """Refuse what the header tells already.

    Raises:
        PictureError: too many pixels, an absurd shape, several frames, unknown pixels.
    """
    width, height = image.size
    size = f"{width} x {height}"
    if width * height > config.max_pixels:
        raise PictureError("too many pixels", f"{size}: max_pixels = {config.max_pixels}")
    if max(width, height) > config.max_ratio * min(width, height):
        raise PictureError(
            "picture of an absurd shape", f"{size}: more than max_ratio = {config.max_ratio:g} to 1"
        )
    if image.mode in UNKNOWN_PIXELS:
        raise PictureError("pixels of 32 bits", f"mode {image.mode}: their range is not told")
    try:
        frames = int(getattr(image, "n_frames", 1))
    except DECODING as error:
        raise PictureError("damaged picture", reason_of(error)) from None
    if frames > 1 and image.format not in STILL:
        raise PictureError("several frames", f"{frames} frames; write the one that is meant")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB: of 16 bits the higher 8, transparency over white."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16) >> 8
        image = Image.fromarray(values.astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def reason_of(error: BaseException) -> str:
    """Return what Pillow says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
