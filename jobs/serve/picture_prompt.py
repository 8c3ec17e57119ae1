"""Prompts with pictures, prepared as `headrace prepare` would prepare them."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from headrace.dataprep.images.families import family_rule
from headrace.dataprep.images.opening import open_picture
from headrace.dataprep.images.picture import PictureError, Prepared
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.prepare.images_config import ImagesConfig
from headrace.schemas.vision.processor import read_processor
from headrace.schemas.vision.processor_record import Processor
from headrace.trainer.vision.tile import Tile

MARK = "<image>"  # place of a picture in a prompt; without any, pictures stand before it
Render = Callable[[list[dict[str, Any]]], str]


def picture_prompt(
    model: Path, prompt: str, files: Sequence[Path], render: Render | None, system: str | None
) -> tuple[str, list[Tile]]:
    """Return a prompt with the placeholders of its pictures, and their tiles.

    Args:
        render: makes a text of a conversation, of which the prompt is a user's turn; None takes it
            as it stands.

    Raises:
        ConfigError: other pictures than the prompt has places for, or a model without a processor.
        DataError: a file that is no picture, or one that the model does not take.
    """
    processor = read_processor(model)
    limits = ImagesConfig(model=str(model))
    pictures = [opened(path, limits) for path in files]
    parts = parted(prompt, len(files))
    text = processor.tokens["marker"].join(parts)
    if render is not None:
        text = render(conversation(parts, system))
    prepared = [prepare(processor, *pair) for pair in zip(files, pictures, strict=True)]
    tiles = [
        Tile(as_png(tile), number, ready.tokens, *picture.size)
        for number, (ready, picture) in enumerate(zip(prepared, pictures, strict=True))
        for tile in ready.tiles
    ]
    return filled(text, processor.tokens["marker"], prepared), tiles


def parted(prompt: str, count: int) -> list[str]:
    """Cut a prompt where its pictures are.

    Raises:
        ConfigError: it has places for another number of them.
    """
    parts = prompt.split(MARK) if MARK in prompt else [*[""] * count, prompt]
    if len(parts) - 1 != count:
        raise ConfigError(
            f"the prompt has {MARK} {len(parts) - 1} times, and there are {count} of --image; "
            "write it once for each"
        )
    return parts


def conversation(parts: Sequence[str], system: str | None) -> list[dict[str, Any]]:
    """Return a user's turn with pictures between its texts."""
    content: list[dict[str, str]] = []
    for number, part in enumerate(parts):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": part}] if part else []
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": content}]


def filled(text: str, marker: str, prepared: Sequence[Prepared]) -> str:
    """Put what stands for each picture in the place of its marker.

    Raises:
        ConfigError: the chat template has left out pictures.
    """
    between = text.split(marker)
    if len(between) - 1 != len(prepared):
        raise ConfigError(
            f"the chat template writes {len(between) - 1} of {len(prepared)} pictures ({marker}); "
            f"leave --chat out and write {MARK} into the prompt"
        )
    return between[0] + "".join(
        ready.text + rest for ready, rest in zip(prepared, between[1:], strict=True)
    )


def prepare(processor: Processor, path: Path, picture: Image.Image) -> Prepared:
    """Prepare one picture by a model's rule."""
    try:
        return family_rule(processor).prepare(picture)
    except PictureError as error:
        raise DataError(f"{path}: {error.reason} ({error.detail})") from None


def opened(path: Path, config: ImagesConfig) -> Image.Image:
    """Return a picture as `prepare` opens it, within the limits that it has if none are said.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    try:
        return open_picture(path.read_bytes(), config)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    except PictureError as error:
        raise DataError(f"{path}: {error.reason} ({error.detail})") from None


def as_png(image: Image.Image) -> bytes:
    """Return a tile as a file."""
    target = io.BytesIO()
    image.save(target, "PNG")
    return target.getvalue()
