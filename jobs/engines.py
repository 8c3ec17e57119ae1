"""Engines that run a command's work, by the name that the user gives."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from enum import StrEnum
from importlib.util import find_spec

from headrace.dataprep.local_engine import Engine, LocalEngine
from headrace.schemas.errors import ConfigError


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
    for module in ("pyspark", "pandas"):
        if find_spec(module) is None:
            raise ConfigError(f"{module} is not installed; run: pip install 'headrace[spark]'")
    from headrace.dataprep.spark_engine import SparkEngine

    with SparkEngine(workers) as engine:
        yield engine
