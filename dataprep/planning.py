"""The plan of a run: what can be checked before the input is read, and the tasks of its inputs.

Files that the config names are read into it, so that all that decides rows is in it.
"""

import logging
from dataclasses import replace
from pathlib import Path

from headrace.dataprep.formats.extraction import library_version
from headrace.dataprep.images.resolving import resolve_images
from headrace.dataprep.input.files import find_source_files
from headrace.dataprep.input.pieces import InputFile, Task
from headrace.dataprep.input.readers import read_records
from headrace.dataprep.input.tasks import cut_file, plan_tasks
from headrace.dataprep.passes.duplicate_keys import check_library
from headrace.dataprep.rows.evaluation_sets import open_sets
from headrace.dataprep.rows.format_registry import build_format
from headrace.dataprep.rows.pack_blocks import block_options
from headrace.dataprep.text.fast_tokenizer import choose_backend
from headrace.dataprep.text.tokenizer import open_tokenizer
from headrace.dataprep.text.tokenizer_spec import read_spec
from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.dataprep.work.budgets import Budgets
from headrace.dataprep.work.context import Context
from headrace.dataprep.work.workspace import Workspace
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.filter_config import DecontaminateConfig
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.prepare.source_config import SourceConfig

logger = logging.getLogger(__name__)

UNLIMITED = 1 << 62  # bytes


def build_context(config: PrepareConfig, budgets: Budgets | None = None) -> Context:
    """Everything that can be checked before the input is looked at."""
    tokenizer = read_spec(config)
    tokenizer = replace(tokenizer, backend=choose_backend(tokenizer, config.tokenizer_backend))
    check_library(config.deduplicate)
    config = resolve(config, tokenizer)
    for source in config.sources:
        block_options(config, source.name, tokenizer)  # says before the work what is wrong in them
    space = Workspace(Path(config.output), budgets=budgets or Budgets())
    return Context(config, tokenizer, space, build_format)


def plan(context: Context, inputs: list[list[InputFile]]) -> list[Task]:
    """The tasks of a job's inputs, which are the files of each source."""
    sources = context.config.sources
    columns = [context.row_format(source).columns for source in sources]
    return plan_tasks(context.config, inputs, columns)


def resolve(config: PrepareConfig, tokenizer: TokenizerSpec) -> PrepareConfig:
    """The same config with the text of each chat template in place of its file, and the like.

    Raises:
        DataError: a file cannot be read.
    """
    sources = [resolve_source(source, tokenizer) for source in config.sources]
    changes: dict[str, object] = {"sources": sources}
    if config.evaluation_documents is not None:
        records = sum(
            count_records(source) * source.sample_fraction
            for source in sources
            if source.split == "auto"
        )
        changes["evaluation_fraction"] = evaluation_share(config.evaluation_documents, int(records))
    if config.decontaminate is not None:
        changes["decontaminate"] = resolve_sets(config.decontaminate)
    if config.images is not None:
        token_id = open_tokenizer(tokenizer, True).token_to_id
        changes["images"] = resolve_images(config.images, token_id)
    return config.model_copy(update=changes)


def resolve_sets(config: DecontaminateConfig) -> DecontaminateConfig:
    """The same with what tells the sets' texts from others."""
    sets = open_sets(config)
    assert sets is not None, "there is a config"
    if sets.short:
        logger.warning(
            "decontaminate: %d texts of the sets have fewer than %d words and are not looked for",
            sets.short,
            config.words,
        )
    return config.model_copy(update={"sha256": sets.sha256()})


def evaluation_share(wanted: int, records: int) -> float:
    """The share of the records that is about so many of them."""
    if wanted >= records:
        raise DataError(
            f"evaluation_documents = {wanted}, but there are {records} records to choose from; "
            "lower it"
        )
    return wanted / records


def count_records(source: SourceConfig) -> int:
    """Records in the files of a source, of those that it takes."""
    ranges = source.axolotl.row_ranges if source.axolotl is not None else None
    if ranges is not None:
        return sum(end - start for start, end in ranges.values())
    return sum(
        sum(1 for _ in read_records(source, piece, None, UNLIMITED))
        for file in find_source_files(source)
        for piece in cut_file(source, file, None, UNLIMITED)
    )


def resolve_source(source: SourceConfig, tokenizer: TokenizerSpec) -> SourceConfig:
    """One source."""
    if source.extract is not None:
        return source.model_copy(update={"extract_version": library_version(source)})
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
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f'source "{source.name}": chat.template = "{path}" is neither Jinja text nor a '
            f"readable file ({error}); correct the path"
        ) from None
