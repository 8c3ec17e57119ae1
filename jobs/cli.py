"""The `headrace` command. Each command imports what it needs: `prepare` never loads torch."""

import logging
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from headrace.jobs.engines import EngineName, open_engine
from headrace.schemas.errors import ConfigError, HeadraceError
from headrace.schemas.manifest import Manifest

TRAIN_EXTRA = {
    "deepspeed",
    "gguf",
    "matplotlib",
    "peft",
    "safetensors",
    "tensorboard",
    "torch",
    "transformers",
}
GPU_DRIVER_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The config.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Shard directory.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key; may be repeated."),
]


WorkerCount = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes. Default: the machine's cores.")
]
EngineOption = Annotated[
    EngineName, typer.Option("--engine", help="Processes of this machine, or Spark's executors.")
]


@app.callback()
def headrace(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Raw text to shuffled token shards, and shards to pipeline-parallel fine-tuning."""


@app.command(epilog="Example: headrace prepare prepare.toml --workers 4 --set sequence_len=2048")
def prepare(
    config: ConfigFile,
    workers: WorkerCount = None,
    engine: EngineOption = EngineName.LOCAL,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate tokens, time and disk from a sample.")
    ] = False,
) -> None:
    """Turn sources into a shard directory. Run again, it continues where it stopped."""
    from rich.console import Console

    from headrace.dataprep.dry_run import estimate, print_estimate
    from headrace.dataprep.prepare import prepare
    from headrace.schemas.prepare_config import PrepareConfig
    from headrace.schemas.toml_config import load_config

    settings = load_config(PrepareConfig, config, overrides or [])
    if dry_run:
        print_estimate(estimate(settings, workers), settings, Console())
        return
    with open_engine(engine, workers) as chosen:
        prepare(settings, console=Console(), engine=chosen)


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
    from rich.console import Console

    from headrace.dataprep.repartition import Blend, parse_weights, repartition

    shares = parse_weights(weights, len(directories)) if weights is not None else None
    blend = Blend(tuple(directories), out, shards, seed, shares)
    with open_engine(engine, workers) as chosen:
        repartition(blend, chosen, Console())


@app.command(epilog="Example: headrace inspect shards/demo --rows 3")
def inspect(
    directory: Directory,
    rows: Annotated[int, typer.Option(min=0, help="Rows to decode.")] = 2,
) -> None:
    """Show counts, document lengths and decoded rows of a shard directory."""
    from rich.console import Console

    from headrace.dataprep.inspection import inspect

    inspect(directory, rows, Console())


@app.command(epilog="Example: headrace verify shards/demo")
def verify(directory: Directory) -> None:
    """Check hashes, schema, counts and the token ledger; exit with 1 when anything is off."""
    from headrace.dataprep.verify import verify

    problems = verify(directory)
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
    from headrace.dataprep.foreign_index import find_files, index, parse_columns

    columns = parse_columns(column or [], padding_id, find_files(directory)[0])
    manifest = index(directory, tokenizer, columns, evaluation, source)
    print(f"{directory}: {summary(manifest)}")


@app.command(epilog="Example: headrace train train.toml --gpus 2 --set optimizer.lr=1e-4")
def train(
    context: typer.Context,
    config: ConfigFile,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Processes. Default: all GPUs; without any, pipeline_stages."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save.")] = False,
    data_changed: Annotated[
        Literal["refuse", "continue"],
        typer.Option(help="On --resume with other datasets, weights, epochs or max_steps."),
    ] = "refuse",
    overrides: Overrides = None,
    master_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: a free port.")
    ] = None,
) -> None:
    """Fine-tune on shards, over the GPUs of this machine or as processes on its CPU.

    SIGTERM or Ctrl-C saves after the current step and exits with 0.
    """
    from headrace.jobs.launch import launch
    from headrace.schemas.toml_config import load_config
    from headrace.schemas.train_config import TrainConfig
    from headrace.trainer.preflight import check
    from headrace.trainer.run.resume_record import check_run_directory

    for name in ("torch", "deepspeed", "transformers", "peft"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(name=name)
    settings = load_config(TrainConfig, config, overrides or [])
    processes = count_processes(gpus, settings.pipeline_stages)
    inputs = check(settings, processes)
    check_run_directory(settings, inputs, resume, data_changed == "continue")
    arguments = ["--config", str(config), "--data-changed", data_changed]
    arguments += ["--resume"] if resume else []
    arguments += ["--debug"] if context.obj else []
    for override in overrides or []:
        arguments += ["--set", override]
    raise typer.Exit(launch("headrace.trainer.main", arguments, processes, master_port))


@app.command(epilog="Example: headrace plan train.toml --gpus 4 --memory 24GiB")
def plan(
    config: ConfigFile,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs to plan for. Default: pipeline_stages.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of each, such as 24GiB: says what makes it fit.")
    ] = None,
    sequence_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row. Default: the first dataset's.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Predict memory, work and efficiency of each stage, without GPUs or weights."""
    from headrace.schemas.toml_config import load_config
    from headrace.schemas.train_config import TrainConfig
    from headrace.trainer.quiet import quiet_libraries

    settings = load_config(TrainConfig, config, overrides or [])
    quiet_libraries()
    from headrace.trainer.model.plan_report import parse_size, plan_run, report

    limit = parse_size(memory) if memory else None
    count = gpus or settings.pipeline_stages
    print(report(plan_run(settings, count, sequence_len), count, limit))


@app.command(epilog="Example: headrace checkpoints runs/demo")
def checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory: `output_dir`.")],
) -> None:
    """List a run's checkpoints and check their hashes; non-zero exit if one is damaged."""
    from headrace.jobs.list_checkpoints import list_checkpoints

    raise typer.Exit(0 if list_checkpoints(run) else 1)


@app.command(
    name="plan-data", epilog="Example: headrace plan-data train.toml --gpus 8 --plot mixture.png"
)
def plan_data(
    config: ConfigFile,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Processes to plan for. Default: pipeline_stages.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the mixture over the steps.")
    ] = None,
    steps: Annotated[
        Path | None, typer.Option(metavar="JSONL", help="Write a line for each step.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Show what each step of a training run will see: sources, fill, epochs, memory."""
    from rich.console import Console

    from headrace.jobs.plan_data import plan_data
    from headrace.schemas.toml_config import load_config
    from headrace.schemas.train_config import TrainConfig

    settings = load_config(TrainConfig, config, overrides or [])
    plan_data(settings, gpus or settings.pipeline_stages, Console(), plot, steps)


@app.command(
    epilog="Example: headrace merge --model models/smollm2-135m --adapter runs/demo/adapter "
    "--output models/merged"
)
def merge(
    model: Annotated[Path, typer.Option(help="Base model directory.")],
    adapter: Annotated[Path, typer.Option(help="Adapter directory, in PEFT's format.")],
    output: Annotated[Path, typer.Option(help="Model directory to write.")],
) -> None:
    """Merge an adapter into its base model."""
    from headrace.trainer.export.merge import merge

    merge(model, adapter, output)
    print(f"{output}: written")


@app.command(epilog="Example: headrace control-report runs/demo/adapter --plot control.png")
def control_report(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Directory of control adapters.")
    ],
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw norms and effective rank.")
    ] = None,
) -> None:
    """Show norms, orthogonality, effective rank and condition of control adapters by layer."""
    from rich.console import Console

    from headrace.jobs.control_report import control_report

    control_report(adapter, Console(), plot)


@app.command(
    epilog="Example: headrace control-to-lora --model models/command-r --adapter runs/demo/adapter "
    "--output adapters/demo"
)
def control_to_lora(
    model: Annotated[Path, typer.Option(help="Base model directory.")],
    adapter: Annotated[Path, typer.Option(help="Directory of control adapters.")],
    output: Annotated[Path, typer.Option(help="Adapter directory to write, in PEFT's format.")],
    inverse: Annotated[bool, typer.Option("--inverse", help="That of class -1.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write it even where it is not the same.")
    ] = False,
) -> None:
    """Turn control adapters into a LoRA, where that is exact: models of parallel blocks."""
    from headrace.trainer.export.control_lora import control_to_lora
    from headrace.trainer.quiet import quiet_libraries

    quiet_libraries()
    error = control_to_lora(model, adapter, output, inverse=inverse, force=force)
    print(f"{output}: written; it misses {error:.2g} of what the control adapters change")


@app.command(epilog="Example: headrace export-gguf models/merged --output merged.gguf --type q8_0")
def export_gguf(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Model directory; an adapter's base model.")
    ],
    output: Annotated[Path, typer.Option(help="File to write.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Write only this adapter, to be used over the base model.")
    ] = None,
    type: Annotated[  # noqa: A002
        Literal["f32", "f16", "bf16", "q8_0"], typer.Option(help="Type of the matrices.")
    ] = "bf16",
    pre: Annotated[
        str | None,
        typer.Option(help="llama.cpp's name of the pre-tokenizer, where it is not recognised."),
    ] = None,
) -> None:
    """Write a model, or an adapter, as a GGUF file for llama.cpp."""
    from headrace.trainer.export.gguf_export import export_gguf

    count = export_gguf(model, output, type, adapter, pre)
    print(f"{output}: {count} tensors")


@app.command(epilog='Example: headrace sample models/merged "def parse(" --max-new-tokens 60')
def sample(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model directory.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter to apply.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="For a temperature above 0.")] = 0,
) -> None:
    """Continue a prompt with a model."""
    from headrace.trainer.export.sample import sample

    print(sample(model, adapter, prompt, max_new_tokens, temperature, seed))


def summary(manifest: Manifest) -> str:
    """One line on what was found."""
    rows, tokens = (sum(getattr(s, name) for s in manifest.shards) for name in ("rows", "tokens"))
    trained = sum(shard.trained_tokens for shard in manifest.shards)
    return (
        f"{len(manifest.shards)} files, {rows:,} rows of up to {manifest.sequence_len} tokens, "
        f"{tokens:,} in all, {trained:,} of them trained"
    )


def count_processes(gpus: int | None, pipeline_stages: int) -> int:
    """How many ranks to start; checked against the stages and the GPUs there are."""
    available = count_gpus()
    processes = gpus or available or pipeline_stages
    if available and processes > available:
        raise ConfigError(f"--gpus {processes}: this machine has {available}; ask for fewer")
    if processes % pipeline_stages:
        fitting = max(processes // pipeline_stages, 1) * pipeline_stages
        raise ConfigError(
            f"pipeline_stages = {pipeline_stages} does not divide the {processes} processes; "
            f"use --gpus {fitting} or another pipeline_stages"
        )
    return processes


def count_gpus() -> int:
    """GPUs that torch can use. Without a driver torch, which takes seconds, is not loaded."""
    if not any(os.path.exists(path) for path in GPU_DRIVER_FILES):  # noqa: PTH110
        return 0
    import torch

    return torch.cuda.device_count()


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends in one line on stderr and exit code 1."""
    given = sys.argv[1:] if arguments is None else arguments
    words = [word for word in given if word != "--debug"]
    debug = len(words) < len(given)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("headrace").setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        app(words, obj=debug)
    except (HeadraceError, OSError, ModuleNotFoundError) as error:
        if debug or is_our_bug(error):
            raise
        sys.exit("\n".join(f"error: {line}" for line in explain(error).splitlines()))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def is_our_bug(error: Exception) -> bool:
    """Whether a module is missing that no extra brings."""
    return isinstance(error, ModuleNotFoundError) and root_name(error) not in TRAIN_EXTRA


def explain(error: Exception) -> str:
    """The message for the user."""
    if isinstance(error, ModuleNotFoundError):
        return f"{root_name(error)} is not installed; run: pip install 'headrace[train]'"
    return str(error)


def root_name(error: ModuleNotFoundError) -> str:
    """`torch` for `torch.distributed.pipelining`."""
    return (error.name or "").partition(".")[0]


if __name__ == "__main__":
    main()
