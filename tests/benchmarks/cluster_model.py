"""`prepare()` on a cluster: what the driver does for 100,000 tasks, measured, and the time of a
corpus by a model of the cluster, in which executors are lost and slow tasks are run twice."""

import argparse
import heapq
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from report import MODEL, print_table

from headrace.dataprep.input.pieces import InputFile, Piece, Task
from headrace.dataprep.passes.merge_runs import next_level
from headrace.dataprep.passes.sorted_runs import Runs
from headrace.dataprep.planning import build_context
from headrace.dataprep.prepare import run_tasks
from headrace.dataprep.rows.task_stats import TaskStats
from headrace.dataprep.work.budgets import Budgets
from headrace.dataprep.work.reporter import LoggedReporter
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.prepare.prepare_config import PrepareConfig

T = TypeVar("T")

BYTES_IN_TOKEN = 3.7
LAUNCH = 0.005  # seconds for which Spark's driver is busy with one of its tasks
START = 2.0  # seconds until an executor has loaded libraries and tokenizer
SPECULATION = (0.75, 1.5)  # share of tasks that must have ended; times their median
STAGES = {"tasks": 80.0, "merge": 15.0, "shards": 45.0}  # ns of one core for a token


class Cluster(NamedTuple):
    """Cores, and what goes wrong: hours until a core is lost, and the spread of tasks' times."""

    cores: int
    hours_to_loss: float
    spread: float  # of the logarithm of a task's time


class Outcome(NamedTuple):
    """Seconds from the start of a stage to its end, and attempts that were lost or in vain."""

    seconds: float
    lost: int
    twice: int


def simulate(durations: np.ndarray, cluster: Cluster, seed: int) -> Outcome:
    """Run a stage task by task: a lost attempt is begun anew, a slow one a second time elsewhere.

    A result counts once, whichever attempt is first; the driver launches one after the other.
    """
    generator = np.random.default_rng(seed)
    usual = float(np.median(durations))
    queue = list(range(len(durations)))[::-1]
    free = [START] * cluster.cores  # when each core is free
    heapq.heapify(free)
    done = np.full(len(durations), np.inf)
    launched, lost, twice = 0.0, 0, 0
    slow: list[int] = []
    while queue or slow:
        if not queue:
            task = slow.pop()
            if done[task] <= free[0]:
                continue
            twice += 1
            attempt = usual * generator.lognormal(0, cluster.spread)
        else:
            task = queue.pop()
            attempt = float(durations[task])
        launched = max(launched + LAUNCH, heapq.heappop(free))
        dies = generator.exponential(cluster.hours_to_loss * 3600)
        if dies < attempt:
            lost += 1
            queue.append(task)
            heapq.heappush(free, launched + dies + START)
            continue
        end = launched + attempt
        late = len(durations) - len(queue) > SPECULATION[0] * len(durations)
        if late and attempt > SPECULATION[1] * usual and np.isinf(done[task]):
            slow.append(task)
        done[task] = min(done[task], end)
        heapq.heappush(free, end)
    return Outcome(float(done.max()), lost, twice)


def stage_seconds(name: str, tokens: float, tasks: int, cluster: Cluster) -> Outcome:
    """One stage of a corpus, in tasks of unequal times."""
    generator = np.random.default_rng(tasks)
    mean = tokens / tasks * STAGES[name] / 1e9
    shape = generator.lognormal(-(cluster.spread**2) / 2, cluster.spread, tasks)
    return simulate(mean * shape, cluster, tasks)


def spent(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a piece of work, and its result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


class Instant:
    """An engine whose tasks have all been done elsewhere."""

    def run(self, function, items):  # type: ignore[no-untyped-def]
        """Each item with some counts."""
        stats = TaskStats(documents=1000, tokens_in=1 << 20, rows={"train": 1000})
        for item in items:
            yield item, stats


def measure_driver(folder: Path, count: int) -> list[tuple[str, float]]:
    """Seconds of the driver for so many tasks, by what it does."""
    source = {"name": "web", "type": "documents", "path": "web.jsonl"}
    config = PrepareConfig.model_validate(
        {"output": str(folder / "out"), "tokenizer": str(MODEL), "sources": [source]}
    )
    context = build_context(config)
    file = InputFile("web.jsonl", count << 28, 0)
    tasks = [
        Task(n, n, config.sources[0], (Piece(file, "jsonl", n << 28, n + 1 << 28, 1 << 28),))
        for n in range(count)
    ]
    (folder / "out" / ".work").mkdir(parents=True)
    context.space.open()
    sent, content = spent(lambda: pickle.dumps(tuple(tasks)))
    return [
        (f"tasks sent, {len(content) / 1e6:.0f} MB", sent),
        ("tasks read by an executor", spent(lambda: pickle.loads(content))[0]),
        (
            "results taken and counted",
            spent(lambda: run_tasks(context, tasks, Instant(), LoggedReporter()))[0],
        ),
        ("key of all rows", spent(lambda: fingerprint([*map(context.task_key, tasks)]))[0]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure_driver(Path(name), options.tasks)
    print_table(
        f"the driver, {options.tasks:,} tasks",
        ("", "seconds"),
        [(label, f"{seconds:.1f}") for label, seconds in found],
    )
    rows = []
    for terabytes, cores in ((1, 256), (10, 1024), (100, 4096)):
        tokens = terabytes * 1e12 / BYTES_IN_TOKEN
        tasks = min(options.tasks, int(terabytes * 1e12 / (1 << 29)))
        runs = Runs("train", tasks, int(tokens), "")
        merged = next_level(runs, Budgets())
        counts = {"tasks": tasks, "merge": merged.groups * merged.ranges if merged else 0}
        counts["shards"] = int(tokens / (1 << 28))
        for cluster in (Cluster(cores, 1e9, 0.1), Cluster(cores, 20, 0.8)):
            outcomes = [
                stage_seconds(stage, tokens, count, cluster)
                for stage, count in counts.items()
                if count
            ]
            ideal = tokens * sum(STAGES[stage] for stage, count in counts.items() if count)
            seconds = sum(outcome.seconds for outcome in outcomes)
            rows.append(
                (
                    f"{terabytes} TB, {cores:,} cores"
                    + (", failing" if cluster.spread > 0.5 else ""),
                    " + ".join(f"{count:,}" for count in counts.values() if count),
                    f"{seconds / 3600:.2f}",
                    f"{ideal / 1e9 / cores / seconds:.0%}",
                    f"{sum(outcome.lost for outcome in outcomes):,}",
                    f"{sum(outcome.twice for outcome in outcomes):,}",
                )
            )
    print_table(
        "simulated; where failing, a core is lost after 20 hours of it, and times spread by e^0.8",
        ("", "tasks + merges + shards", "hours", "busy", "lost", "run twice"),
        rows,
    )


if __name__ == "__main__":
    main()
