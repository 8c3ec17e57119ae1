"""The `headrace` command. Each command imports what it needs: `prepare` never loads torch."""

import logging
import signal
import sys
from typing import Annotated

import typer

from headrace.jobs.commands import data, model, train
from headrace.jobs.serve import benchmark
from headrace.jobs.serve import commands as answers
from headrace.schemas.errors import HeadraceError, install_hint
from headrace.schemas.outside_text import visible
from headrace.schemas.process_limits import open_closed_streams

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

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def headrace(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Raw text to shuffled token shards, and shards to pipeline-parallel fine-tuning."""


for group in (data, train, model, answers, benchmark):
    app.add_typer(group.app)


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends in one line on stderr and exit code 1."""
    open_closed_streams()
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
        sys.exit("\n".join(f"error: {visible(line)}" for line in explain(error).split("\n")))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def is_our_bug(error: Exception) -> bool:
    """Return whether a module is missing that no extra brings."""
    return isinstance(error, ModuleNotFoundError) and root_name(error) not in TRAIN_EXTRA


def explain(error: Exception) -> str:
    """The message for the user."""
    if isinstance(error, ModuleNotFoundError):
        return f"{root_name(error)} is not installed; {install_hint('train')}"
    return str(error)


def root_name(error: ModuleNotFoundError) -> str:
    """`torch` for `torch.distributed.pipelining`."""
    return (error.name or "").partition(".")[0]


if __name__ == "__main__":
    main()
