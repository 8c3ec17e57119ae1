"""Numbers of an image processor, each as its file has it or as its class in transformers does."""

from collections.abc import Mapping
from typing import Any

from headrace.schemas.vision.processor_files import ProcessorFiles
from headrace.schemas.vision.processor_record import Settings

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
HALVES = [0.5, 0.5, 0.5]
BILINEAR, BICUBIC, LANCZOS = 2, 3, 1  # as Pillow numbers its filters
FILTERS = (0, 1, 2, 3, 4, 5)
MUST_BE_SET = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")


def common(files: ProcessorFiles, resample: int, mean: list[float], std: list[float]) -> Settings:
    """Return the numbers that every processor has; the arguments are what its class has.

    Raises:
        ConfigError: it leaves out a step, or has numbers that cannot be.
    """
    for name in MUST_BE_SET:
        if files.image.get(name) is False:
            raise files.refuse(f"its image processor has {name} = false, which is not supported")
    found = {
        "resample": given(files.image, "resample", resample),
        "rescale_factor": given(files.image, "rescale_factor", 1 / 255),
        "image_mean": given(files.image, "image_mean", mean),
        "image_std": given(files.image, "image_std", std),
    }
    if found["resample"] not in FILTERS:
        raise files.refuse(f"resample = {found['resample']!r} is none of Pillow's filters")
    for name in ("image_mean", "image_std"):
        if not is_color(found[name]):
            raise files.refuse(f"{name} = {found[name]!r} is not three numbers")
    return found


def given(values: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return a value of a file, or the default where it has none."""
    found = values.get(name)
    return default if found is None else found


def is_color(value: object) -> bool:
    """Return whether a value is a number for each of red, green and blue."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(part, int | float) for part in value)
    )


def whole(files: ProcessorFiles, name: str, value: object) -> int:
    """Return a number of pixels, patches or tokens.

    Raises:
        ConfigError: it is none, or below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise files.refuse(f"{name} = {value!r} is not a whole number of at least 1")
    return value


def edges(files: ProcessorFiles, name: str, default: Mapping[str, int]) -> Settings:
    """Return a size, as `{height, width}`, `{shortest_edge}` or `{longest_edge}`; a number alone is
    the side of a square.
    """
    found = given(files.image, name, default)
    if isinstance(found, int):
        found = {"height": found, "width": found}
    if not isinstance(found, Mapping):
        raise files.refuse(f"{name} = {found!r} is not a size")
    sides = {key: value for key, value in found.items() if value is not None}
    return {key: whole(files, f"{name}.{key}", value) for key, value in sorted(sides.items())}
