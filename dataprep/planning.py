"""The plan of a run: what can be checked before the input is read, and the tasks of its inputs."""

from dataclasses import replace
from pathlib import Path

from headrace.dataprep.input.pieces import InputFile, Task
from headrace.dataprep.input.tasks import plan_tasks
from headrace.dataprep.passes.duplicate_keys import check_library
from headrace.dataprep.resolve import resolve
from headrace.dataprep.rows.blocks import block_options
from headrace.dataprep.rows.format_registry import build_format
from headrace.dataprep.text.fast_tokenizer import choose_backend
from headrace.dataprep.text.tokenizer_spec import read_spec
from headrace.dataprep.work.context import Context
from headrace.dataprep.work.workspace import Workspace
from headrace.schemas.prepare.prepare_config import PrepareConfig


def build_context(config: PrepareConfig) -> Context:
    """Everything that can be checked before the input is looked at."""
    tokenizer = read_spec(config)
    tokenizer = replace(tokenizer, backend=choose_backend(tokenizer, config.tokenizer_backend))
    check_library(config.deduplicate)
    config = resolve(config, tokenizer)
    for source in config.sources:
        block_options(config, source.name, tokenizer)  # says before the work what is wrong in them
    return Context(config, tokenizer, Workspace(Path(config.output)), build_format)


def plan(context: Context, inputs: list[list[InputFile]]) -> list[Task]:
    """The tasks of a job's inputs, which are the files of each source."""
    sources = context.config.sources
    columns = [context.row_format(source).columns for source in sources]
    return plan_tasks(context.config, inputs, columns)
