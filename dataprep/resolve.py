"""The config with the files that it names read into it, so that all that decides rows is in it."""

from pathlib import Path

from headrace.dataprep.tokenizer import TokenizerSpec
from headrace.schemas.errors import DataError
from headrace.schemas.prepare_config import PrepareConfig, SourceConfig


def resolve(config: PrepareConfig, tokenizer: TokenizerSpec) -> PrepareConfig:
    """The same config with the text of each chat template in place of its file.

    Raises:
        DataError: a file cannot be read.
    """
    sources = [resolve_source(source, tokenizer) for source in config.sources]
    return config.model_copy(update={"sources": sources})


def resolve_source(source: SourceConfig, tokenizer: TokenizerSpec) -> SourceConfig:
    """One source."""
    if source.axolotl is not None:
        from headrace.dataprep.axolotl.selection import resolve_options

        return resolve_options(source)
    template = source.chat.template if source.chat else None
    if template is None or "{" in template or template in dict(tokenizer.chat_templates):
        return source
    assert source.chat is not None
    chat = source.chat.model_copy(update={"template": read_template(source, Path(template))})
    return source.model_copy(update={"chat": chat})


def read_template(source: SourceConfig, path: Path) -> str:
    """The template in a file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f'source "{source.name}": chat.template = "{path}" is neither Jinja text nor a '
            f"readable file ({error}); correct the path"
        ) from None
