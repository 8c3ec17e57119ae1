"""The config of pictures with what the model's files say in it, so that it decides every byte."""

from collections.abc import Callable
from pathlib import Path

from headrace.schemas.errors import ConfigError, DataError, install_hint
from headrace.schemas.prepare.images_config import ImagesConfig
from headrace.schemas.vision.processor import read_files, read_processor
from headrace.schemas.vision.processor_record import Processor

ID_NAMES = ("image_token_id", "image_token_index")  # in config.json


def resolve_images(config: ImagesConfig, token_id: Callable[[str], int | None]) -> ImagesConfig:
    """Return the config with the identity of what prepares pictures.

    Args:
        token_id: the tokenizer's id of a token, None where it has none.

    Raises:
        ConfigError: the model's processor cannot be followed, Pillow is missing, or `identity` is
            given and not what there is.
        DataError: the tokenizer lacks a token of the family.
    """
    version = pillow_version()
    processor = read_processor(Path(config.model), config.processor)
    identity = {
        "family": processor.family,
        "settings": processor.settings,
        "placeholder_id": placeholder_id(config, processor, token_id),
        "pillow": version,
    }
    if config.identity is not None and config.identity != identity:
        names = [name for name in identity if config.identity.get(name) != identity[name]]
        raise ConfigError(
            f"images.identity: {', '.join(names)} of the config is not what is there; remove "
            "identity, or install what it names"
        )
    return config.model_copy(update={"identity": identity})


def pillow_version() -> str:
    """Return the version of Pillow, which decides the bytes of pictures.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import PIL
    except ImportError:
        raise ConfigError(f"[images] needs Pillow; {install_hint('images')}") from None
    return str(PIL.__version__)


def placeholder_id(
    config: ImagesConfig, processor: Processor, token_id: Callable[[str], int | None]
) -> int:
    """Return the id of the tokens that pictures fill.

    Raises:
        DataError: the tokenizer has not the tokens of the family, or gives it another id.
    """
    for name, text in processor.tokens.items():
        if token_id(text) is None:
            raise DataError(
                f'tokenizer: no token "{text}", which {processor.family} has for pictures '
                f"({name}); set tokenizer to that of {config.model}"
            )
    found = token_id(processor.tokens["placeholder"])
    assert found is not None, "it was looked for"
    values = read_files(Path(config.model)).config
    own = next((values[name] for name in ID_NAMES if values.get(name) is not None), found)
    if own != found:
        raise DataError(
            f'tokenizer: "{processor.tokens["placeholder"]}" is {found}, {config.model} has {own} '
            "for pictures; set tokenizer to that of the model"
        )
    return found
