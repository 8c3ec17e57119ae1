"""The commands on shard directories: none of them loads torch."""

from pathlib import Path
from typing import Annotated

import typer

from headrace.jobs.commands.options import (
    ConfigFile,
    Directory,
    EngineName,
    Overrides,
    WorkerCount,
    open_engine,
)
from headrace.schemas.shards.manifest import Manifest

app = typer.Typer()

EngineOption = Annotated[
    EngineName, typer.Option("--engine", help="Processes of this machine, or Spark's executors.")
]


@app.command(epilog="Example: headrace prepare prepare.toml --workers 4 --set sequence_len=2048")
def prepare(
    config: ConfigFile,
    workers: WorkerCount = None,
    engine: EngineOption = EngineName.LOCAL,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Estimate the result from a sample, and show rows."),
    ] = False,
    rows: Annotated[int, typer.Option(min=0, help="Rows of each source for --dry-run.")] = 1,
) -> None:
    """Turn sources into a shard directory. Run again, it continues where it stopped."""
    from rich.console import Console

    from headrace.dataprep.dry_run import survey
    from headrace.dataprep.prepare import prepare
    from headrace.dataprep.text.tokenizer import open_tokenizer
    from headrace.jobs.console.estimate import print_estimate, print_findings
    from headrace.jobs.console.reporter import ConsoleReporter
    from headrace.schemas.prepare.prepare_config import PrepareConfig
    from headrace.schemas.toml_config import load_config

    settings = load_config(PrepareConfig, config, overrides or [])
    if dry_run:
        console = Console(markup=False, emoji=False)
        found = survey(settings, workers)
        print_estimate(found.estimate, settings, console)
        print_findings(found.findings, open_tokenizer(found.tokenizer, True), rows, console)
        return
    with open_engine(engine, workers) as chosen:
        prepare(settings, reporter=ConsoleReporter(), engine=chosen)


@app.command(
    epilog="Example: headrace repartition shards/code shards/articles --out shards/blend "
    "--shards 64 --weights 3,1"
)
def repartition(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Shard directories.")],
    out: Annotated[Path, typer.Option(help="Shard directory to write.")],
    shards: Annotated[int, typer.Option(min=1, max=99_999, help="Number of train shards.")],
    seed: Annotated[
        int | None, typer.Option(min=0, help="Decides the order. Default: a new order.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Shares of train tokens. Default: all rows of all."),
    ] = None,
    workers: WorkerCount = None,
    engine: EngineOption = EngineName.LOCAL,
) -> None:
    """Shuffle shard directories into one with another number of shards."""
    from headrace.dataprep.shards.blend_inputs import Blend
    from headrace.dataprep.shards.repartition import parse_weights, repartition
    from headrace.jobs.console.reporter import ConsoleReporter

    shares = parse_weights(weights, len(directories)) if weights is not None else None
    blend = Blend(tuple(directories), out, shards, seed, shares)
    with open_engine(engine, workers) as chosen:
        repartition(blend, chosen, ConsoleReporter())


@app.command(epilog="Example: headrace convert-tokenizer models/llama-2-7b")
def convert_tokenizer(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Model directory.")],
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="What cuts words, for tiktoken. Default: that of Llama 3."
        ),
    ] = None,
) -> None:
    """Write tokenizer.json from a directory's tokenizer.model or *.tiktoken."""
    from headrace.jobs.commands.tokenizer_files import convert_tokenizer

    print(convert_tokenizer(directory, pattern))


@app.command(epilog="Example: headrace inspect shards/demo --rows 3")
def inspect(
    directory: Directory,
    rows: Annotated[int, typer.Option(min=0, help="Rows to decode.")] = 2,
    row_key: Annotated[
        list[int] | None,
        typer.Option(min=0, max=2**64 - 1, help="Show the row with this key; repeatable."),
    ] = None,
) -> None:
    """Show counts, document lengths and decoded rows of a shard directory."""
    from rich.console import Console

    from headrace.jobs.console.inspection import inspect, print_rows_of_keys

    if row_key:
        print_rows_of_keys(directory, row_key, Console(markup=False, emoji=False))
    else:
        inspect(directory, rows, Console(markup=False, emoji=False))


@app.command(epilog="Example: headrace verify shards/demo")
def verify(directory: Directory) -> None:
    """Check hashes, schema, counts and the token ledger; exit with 1 when anything is off."""
    from headrace.dataprep.shards.verify import verify
    from headrace.jobs.console.progress import tracked

    problems = verify(directory, tracked)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    print(f"{directory}: sound")


@app.command(epilog="Example: headrace index shards/from-spark --tokenizer models/smollm2-135m")
def index(
    directory: Directory,
    tokenizer: Annotated[Path, typer.Option(help="Model directory that the ids come from.")],
    evaluation: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Files of the evaluation split, as in 'test-*'."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=NAME", help="What a column means, where its name does not."),
    ] = None,
    padding_id: Annotated[
        int | None, typer.Option(help="Id at the end of rows that is padding, and cut off.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Name of the rows' source. Default: the directory's.")
    ] = None,
) -> None:
    """Write a manifest for Parquet that something else wrote, so that it can be trained on."""
    from headrace.dataprep.shards.foreign_index import find_files, index, parse_columns
    from headrace.jobs.console.progress import tracked

    columns = parse_columns(column or [], padding_id, find_files(directory)[0])
    manifest = index(directory, tokenizer, columns, evaluation, source, tracked)
    print(f"{directory}: {summary(manifest)}")


def summary(manifest: Manifest) -> str:
    """One line on what was found."""
    rows, tokens = (sum(getattr(s, name) for s in manifest.shards) for name in ("rows", "tokens"))
    trained = sum(shard.trained_tokens for shard in manifest.shards)
    return (
        f"{len(manifest.shards)} files, {rows:,} rows of up to {manifest.sequence_len} tokens, "
        f"{tokens:,} in all, {trained:,} of them trained"
    )
