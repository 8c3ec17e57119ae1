"""`prepare()` on Spark `local[N]` against processes of this machine, in the same run."""

import argparse
import filecmp
import os
import tempfile
import time
from pathlib import Path

from report import jsonl_config, print_table, write_jsonl

from headrace.dataprep.prepare import prepare
from headrace.dataprep.work.local_engine import LocalEngine
from headrace.dataprep.work.spark_engine import SparkEngine

WORKERS = len(os.sched_getaffinity(0))
CORPUS, COPY_MEGABYTES = "corpus.jsonl", 13.1


def time_local(folder: Path, backend: str) -> float:
    """Seconds from the start to the published manifest, by processes."""
    started = time.perf_counter()
    config = jsonl_config(folder / "local", folder / CORPUS, backend)
    prepare(config, engine=LocalEngine(WORKERS))
    return time.perf_counter() - started


def time_spark(folder: Path, backend: str) -> tuple[float, float]:
    """The same by Spark, and seconds until it has started."""
    started = time.perf_counter()
    with SparkEngine(WORKERS) as engine:
        ready = time.perf_counter()
        config = jsonl_config(folder / "spark", folder / CORPUS, backend)
        prepare(config, engine=engine)
    return time.perf_counter() - started, ready - started


def check_equal(folder: Path) -> None:
    """Both wrote the same files."""
    files = [str(p.relative_to(folder / "local")) for p in (folder / "local").rglob("*.*")]
    _, different, missing = filecmp.cmpfiles(folder / "local", folder / "spark", files, False)
    assert not different and not missing, (different, missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=50, help="of JSONL, 10^6 bytes each")
    parser.add_argument("--backend", default="tokenizers", help="fastokens for 1 GB in minutes")
    options = parser.parse_args()
    backend = options.backend
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / CORPUS, max(1, round(options.megabytes / COPY_MEGABYTES)))
        text = (folder / CORPUS).stat().st_size / 1e6
        local = time_local(folder, backend)
        spark, start = time_spark(folder, backend)
        check_equal(folder)
    print_table(
        f"{text:.0f} MB of JSONL, {backend}, {WORKERS} workers, the same bytes from both",
        ("", "seconds", "MB/s", "times the local engine"),
        [
            ("processes", f"{local:.1f}", f"{text / local:.2f}", "1.00"),
            (
                f"Spark local[{WORKERS}], of which {start:.1f} s start",
                f"{spark:.1f}",
                f"{text / spark:.2f}",
                f"{spark / local:.2f}",
            ),
        ],
    )


if __name__ == "__main__":
    main()
