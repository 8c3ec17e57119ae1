"""Options that several commands have."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from headrace.dataprep.work.local_engine import Engine, LocalEngine
from headrace.schemas.errors import ConfigError, install_hint

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The config.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Shard directory.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key; may be repeated."),
]
WorkerCount = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes. Default: the machine's cores.")
]


class EngineName(StrEnum):
    """Values of `--engine`."""

    LOCAL = "local"
    SPARK = "spark"


@contextmanager
def open_engine(name: EngineName, workers: int | None) -> Iterator[Engine]:
    """Processes of this machine, or Spark, which takes seconds to start and is then stopped."""
    if name is EngineName.LOCAL:
        with closing(LocalEngine(workers)) as local:
            yield local
        return
    if find_spec("pyspark") is None:
        raise ConfigError(f"pyspark is not installed; {install_hint('spark')}")
    from headrace.dataprep.work.spark_engine import SparkEngine

    with SparkEngine(workers) as engine:
        yield engine


def program_name() -> str:
    """Return how these commands are called here: by name, or by path where the shell finds none."""
    return "headrace" if shutil.which("headrace") else sys.argv[0]
