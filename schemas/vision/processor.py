"""The image processor of a model directory, resolved to a family and its numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.schemas.errors import ConfigError
from headrace.schemas.json_text import parse_json
from headrace.schemas.named_files import read_regular
from headrace.schemas.shards.manifest import ImagesRecord
from headrace.schemas.vision.families import FAMILIES, OTHER_TYPES
from headrace.schemas.vision.processor_files import ProcessorFiles
from headrace.schemas.vision.processor_record import Processor

IMAGE_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
NESTED = "image_processor"  # in processor_config.json, as transformers 5 writes it
MAX_BYTES = 1 << 26
BACKENDS = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor")  # ends of classes' names


def read_processor(directory: Path, changes: Mapping[str, Any] | None = None) -> Processor:
    """Return the processor of a model directory.

    Args:
        changes: settings in place of the directory's own; only those that decide sizes.

    Raises:
        ConfigError: no such directory, an unknown family, or settings that cannot be followed.
    """
    files = read_files(directory)
    family = family_of(files)
    record = FAMILIES[family]
    settings = record.settings(files)
    for name, value in (changes or {}).items():
        if name not in record.changeable:
            known = ", ".join(sorted(record.changeable)) or "none"
            raise files.refuse(
                f'images.processor: "{name}" is no setting of {family} that a config may change '
                f"(those are: {known}); remove it"
            )
        check_change(files, name, value, settings[name])
        settings[name] = value
    return Processor(family, settings)


def family_of(files: ProcessorFiles) -> str:
    """Return the family of a model directory, by its model type and its processor's class."""
    kind = str(files.config.get("model_type"))
    family = OTHER_TYPES.get(kind, kind)
    named = processor_class(files)
    if family == "llava" and named == "Pixtral":
        family = "pixtral"
    if family not in FAMILIES:
        raise files.refuse(
            f'pictures of model_type "{kind}" are not supported; those of '
            f"{', '.join(sorted({*FAMILIES, *OTHER_TYPES}))} are"
        )
    if named not in FAMILIES[family].processors:
        raise files.refuse(
            f'image processor "{named}" of a {kind} is not known; its family has '
            f"{' or '.join(FAMILIES[family].processors)}"
        )
    return family


def processor_class(files: ProcessorFiles) -> str:
    """Return the name of the image processor's class without its backend; that of the family where
    the file names none.
    """
    kind = str(files.config.get("model_type"))
    name = files.image.get("image_processor_type") or files.image.get("feature_extractor_type")
    if not isinstance(name, str):
        family = OTHER_TYPES.get(kind, kind)
        return FAMILIES[family].processors[0] if family in FAMILIES else ""
    for end in (*BACKENDS, "FeatureExtractor"):
        if name.endswith(end):
            return name.removesuffix(end)
    return name


def check_change(files: ProcessorFiles, name: str, value: object, own: object) -> None:
    """Refuse a value of another kind than the setting has."""
    flag = isinstance(own, bool)
    fits = isinstance(value, bool) if flag else isinstance(value, int | float)
    if not fits or (not flag and (isinstance(value, bool) or float(str(value)) <= 0)):
        wanted = "true or false" if flag else "a number above 0"
        raise files.refuse(f"images.processor: {name} = {value!r} is not {wanted}; correct it")


def differing(recorded: ImagesRecord, own: Processor) -> list[str]:
    """Return the settings by which shards were prepared that a model would not take: each with both
    values. Sizes of pictures may differ, which a config may choose.
    """
    if recorded.family != own.family:
        return [f"family = {recorded.family}, the model's is {own.family}"]
    free = FAMILIES[own.family].changeable
    names = sorted({*recorded.settings, *own.settings} - free)
    return [
        f"{name} = {recorded.settings.get(name)}, the model's is {own.settings.get(name)}"
        for name in names
        if recorded.settings.get(name) != own.settings.get(name)
    ]


def read_files(directory: Path) -> ProcessorFiles:
    """Read the files of a model directory.

    Raises:
        ConfigError: it has no image processor, or no config.
        DataError: a file is damaged.
    """
    processor = read_table(directory / PROCESSOR_FILE)
    nested = processor.get(NESTED)
    image = nested if isinstance(nested, dict) else read_table(directory / IMAGE_FILE)
    config = read_table(directory / "config.json")
    for name, values in ((IMAGE_FILE, image), ("config.json", config)):
        if not values:
            raise ConfigError(
                f"{directory / name}: not found; name the directory of a vision-language model, "
                "with its processor's files"
            )
    tokenizer = read_table(directory / "tokenizer_config.json")
    return ProcessorFiles(directory, image, processor, config, tokenizer)


def read_table(path: Path) -> dict[str, Any]:
    """Return the table in a JSON file; empty where there is no file, or no table in it."""
    if not path.exists():
        return {}
    values = parse_json(read_regular(path, MAX_BYTES), path, "; fetch the model again")
    return values if isinstance(values, dict) else {}
