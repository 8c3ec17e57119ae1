"""The `headrace` command. Each command imports what it needs: `prepare` never loads torch."""

import logging
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from headrace.schemas.errors import ConfigError, HeadraceError

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


@app.callback()
def headrace(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Raw text to shuffled token shards, and shards to pipeline-parallel fine-tuning."""


@app.command(epilog="Example: headrace prepare prepare.toml --workers 4 --set sequence_len=2048")
def prepare(
    config: ConfigFile,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: the machine's cores.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Turn sources into a shard directory. Run again, it continues where it stopped."""
    from rich.console import Console

    from headrace.dataprep.prepare import prepare
    from headrace.schemas.prepare_config import PrepareConfig
    from headrace.schemas.toml_config import load_config

    prepare(load_config(PrepareConfig, config, overrides or []), workers, Console())


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


@app.command(epilog="Example: headrace train train.toml --gpus 2 --set optimizer.lr=1e-4")
def train(
    context: typer.Context,
    config: ConfigFile,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Processes. Default: all GPUs; without any, pipeline_stages."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save.")] = False,
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
    from headrace.trainer.preflight import check, check_run_directory

    for name in ("torch", "deepspeed", "transformers", "peft"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(name=name)
    settings = load_config(TrainConfig, config, overrides or [])
    processes = count_processes(gpus, settings.pipeline_stages)
    check_run_directory(settings, check(settings, processes), resume)
    arguments = ["--config", str(config)]
    arguments += ["--resume"] if resume else []
    arguments += ["--debug"] if context.obj else []
    for override in overrides or []:
        arguments += ["--set", override]
    raise typer.Exit(launch("headrace.trainer.main", arguments, processes, master_port))


@app.command(epilog="Example: headrace checkpoints runs/demo")
def checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory: `output_dir`.")],
) -> None:
    """List a run's checkpoints and check their hashes; non-zero exit if one is damaged."""
    from headrace.jobs.list_checkpoints import list_checkpoints

    raise typer.Exit(0 if list_checkpoints(run) else 1)


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
    from headrace.trainer.merge import merge

    merge(model, adapter, output)
    print(f"{output}: written")


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
    from headrace.trainer.gguf_export import export_gguf

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
    from headrace.trainer.sample import sample

    print(sample(model, adapter, prompt, max_new_tokens, temperature, seed))


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
