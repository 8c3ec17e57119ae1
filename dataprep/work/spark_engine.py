"""Runs work on the executors of Spark. Read against pyspark 4.3.

Spark decides who runs what, repeats what was lost, and runs slow work twice if told to. Rows do not
pass through it: workers read and write the output's working folder, which all of them must see.
"""

import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from py4j.protocol import Py4JError
from pyspark import AccumulatorParam, InheritableThread, SparkContext
from pyspark.accumulators import Accumulator
from pyspark.core.broadcast import Broadcast
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from headrace.dataprep.work.local_engine import use_one_thread
from headrace.schemas.errors import ConfigError, DataError, HeadraceError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

POLL_SECONDS = 0.1
LOCAL_PARTITIONS = 16  # a part costs 50 ms; with fewer of them, cores wait longer for the last
ATTEMPTS = 4  # of what fails for no reason of the user's, as on a cluster
SPARK_ERRORS = (PySparkException, Py4JError)
QUIET: dict[str, bool | float | int | str | None] = {
    "spark.ui.showConsoleProgress": "false",
    "spark.log.level": "ERROR",
}


class SparkEngine:
    """The executors of a Spark session; the one there is, or a new one.

    Args:
        workers: cores of this machine that Spark gets. Default: Spark's own configuration decides,
            which without `spark-submit` and `spark-defaults.conf` is all cores of this machine.
        partitions: how many parts Spark schedules the items in. Default: one for each on a cluster,
            `LOCAL_PARTITIONS` for each core on this machine.
    """

    def __init__(self, workers: int | None = None, partitions: int | None = None) -> None:
        self.partitions = partitions
        self.owned = SparkSession.getActiveSession() is None
        builder = SparkSession.builder
        if self.owned:
            builder = builder.appName("headrace")
        if "PYSPARK_GATEWAY_PORT" not in os.environ and self.owned:  # not under spark-submit
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
            builder = builder.config(map=QUIET)
        if workers is not None:
            builder = builder.master(f"local[{workers},{ATTEMPTS}]")
            if self.owned:  # a second of processor time
                builder = builder.config("spark.ui.enabled", "false")
        try:
            self.session = builder.getOrCreate()
        except SPARK_ERRORS as error:
            raise ConfigError(
                f"Spark does not start ({first_line(error)}); it needs Java 17 or newer: "
                "install it, or set JAVA_HOME"
            ) from None

    def __enter__(self) -> "SparkEngine":
        return self

    def __exit__(self, *error: object) -> None:
        if self.owned:
            self.session.stop()

    def run(
        self, function: Callable[[ItemT], ResultT], items: Iterable[ItemT]
    ) -> Iterator[tuple[ItemT, ResultT]]:
        """Each item with its result, in the order in which they finish."""
        todo = list(items)
        if not todo:
            return
        context = self.session.sparkContext
        work = context.broadcast(Work(function, tuple(todo), str(Path.cwd())))
        finished: Accumulator[list[Any]] = context.accumulator([], Collected())
        partitions = self.partitions or default_partitions(context, len(todo))
        job = SparkJob(self.session, work, finished, len(todo), min(partitions, len(todo)))
        job.start()
        try:
            for number, result in job.results():
                if isinstance(result, HeadraceError):
                    raise result
                yield todo[number], result
        finally:
            job.stop()
            work.destroy()


def default_partitions(context: SparkContext, items: int) -> int:
    """Parts for so many items. How many cores a cluster will give is not known in advance."""
    if (context.master or "").startswith("local"):
        return LOCAL_PARTITIONS * context.defaultParallelism
    return items


@dataclass(frozen=True)
class Work:
    """Work that every executor is told: the function, all items, the folder of relative paths."""

    function: Callable[[Any], Any]
    items: tuple[Any, ...]
    working_directory: str


class Collected(AccumulatorParam[list[Any]]):
    """Results as Spark's tasks end: an accumulator of (item's number, result)."""

    def zero(self, value: list[Any]) -> list[Any]:
        """No results."""
        return []

    def addInPlace(self, value1: list[Any], value2: list[Any]) -> list[Any]:  # noqa: N802
        """Further results."""
        value1.extend(value2)
        return value1


class SparkJob:
    """One job of Spark in a thread of its own, whose results are read while it runs."""

    def __init__(
        self,
        session: SparkSession,
        work: Broadcast[Work],
        finished: Accumulator[list[Any]],
        count: int,
        partitions: int,
    ) -> None:
        self.session = session
        self.work = work
        self.finished = finished
        self.count = count
        self.partitions = partitions
        self.tag = f"headrace-{uuid.uuid4().hex}"
        self.error: Exception | None = None
        self.ended = threading.Event()
        self.thread = InheritableThread(target=self.collect, daemon=True)

    def start(self) -> None:
        """Let Spark begin."""
        self.thread.start()

    def collect(self) -> None:
        """The job itself; its results come through the accumulator."""
        work, finished = self.work, self.finished
        context = self.session.sparkContext
        context.addJobTag(self.tag)
        try:  # no table: the first one costs ten seconds of Spark's, for its compiler and Arrow
            numbers = context.parallelize(range(self.count), self.partitions)
            numbers.foreachPartition(lambda part: run_items(work, finished, part))
        except Exception as error:  # noqa: BLE001 (the thread's end: `results` tells it)
            self.error = error
        finally:
            self.ended.set()

    def results(self) -> Iterator[tuple[int, Any]]:
        """(item's number, result) of each item once, as they finish."""
        done: set[int] = set()
        read = 0
        while len(done) < self.count:
            ended = self.ended.wait(POLL_SECONDS)
            found = self.finished.value
            while read < len(found):  # it grows meanwhile
                number, result = found[read]
                found[read] = None  # the list lives as long as the job
                read += 1
                if number not in done:
                    done.add(number)
                    yield number, result
            if ended and len(done) < self.count and read == len(self.finished.value):
                raise DataError(explain(self.error, len(done), self.count)) from self.error

    def stop(self) -> None:
        """Cancel what still runs."""
        if not self.ended.is_set():
            self.session.sparkContext.cancelJobsWithTag(self.tag)
        self.thread.join()


def run_items(
    work: Broadcast[Work], finished: Accumulator[list[Any]], numbers: Iterable[int]
) -> None:
    """Call the function, on an executor, on the items with these numbers."""
    use_one_thread()
    if Path(work.value.working_directory).is_dir():
        os.chdir(work.value.working_directory)
    for number in numbers:
        finished.add([(number, attempt(work.value.function, work.value.items[number]))])


def attempt(function: Callable[[ItemT], ResultT], item: ItemT) -> ResultT | HeadraceError:
    """The result, or the user's mistake: as an exception Spark would try it again."""
    try:
        return function(item)
    except HeadraceError as error:
        return error
    except FileNotFoundError as error:
        return DataError(
            f"{error.filename or error}: not found on {socket.gethostname()}; sources and output "
            "must lie on storage that every executor sees, under the same absolute path"
        )


def explain(error: Exception | None, done: int, count: int) -> str:
    """One line for the user: what the worker raised, rather than Spark's trace of it."""
    lost = f"it ended after {done} of {count} pieces of work without an error"
    lines = [lost] if error is None else str(error).splitlines() or [repr(error)]
    raised = [line for line in lines if line[:1].isalpha() and "Error: " in line]
    reason = raised[-1] if raised else lines[0]
    return f"Spark gave up ({reason}); run again to continue; the executors' logs tell more"


def first_line(error: Exception) -> str:
    """The first line of a message."""
    return str(error).partition("\n")[0].rstrip(".")
