"""`prepare()` on Spark `local[N]` against processes of this machine, in the same run."""

import argparse
import filecmp
import io
import os
import tempfile
import time
from pathlib import Path

from report import print_table, text_config
from rich.console import Console

from headrace.dataprep.inputs import find_inputs
from headrace.dataprep.local_engine import LocalEngine
from headrace.dataprep.prepare import prepare
from headrace.dataprep.spark_engine import SparkEngine

WORKERS = len(os.sched_getaffinity(0))


def time_local(folder: Path, copies: int, backend: str) -> float:
    """Seconds from the start to the published manifest, by processes."""
    started = time.perf_counter()
    config = text_config(folder / "local", copies, backend=backend)
    prepare(config, console=Console(file=io.StringIO()), engine=LocalEngine(WORKERS))
    return time.perf_counter() - started


def time_spark(folder: Path, copies: int, backend: str) -> tuple[float, float]:
    """The same by Spark, and seconds until it has started."""
    started = time.perf_counter()
    with SparkEngine(WORKERS) as engine:
        ready = time.perf_counter()
        config = text_config(folder / "spark", copies, backend=backend)
        prepare(config, console=Console(file=io.StringIO()), engine=engine)
    return time.perf_counter() - started, ready - started


def check_equal(folder: Path) -> None:
    """Both wrote the same files."""
    files = [str(p.relative_to(folder / "local")) for p in (folder / "local").rglob("*.*")]
    _, different, missing = filecmp.cmpfiles(folder / "local", folder / "spark", files, False)
    assert not different and not missing, (different, missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=50, help="text, of 10^6 bytes")
    parser.add_argument("--backend", default="tokenizers", help="fastokens for 1 GB in minutes")
    options = parser.parse_args()
    size, backend = options.megabytes, options.backend
    (once,) = find_inputs(text_config(Path("unused")))
    copies = max(1, round(size * 1e6 / sum(file.size for file in once)))
    text = copies * sum(file.size for file in once) / 1e6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        local = time_local(folder, copies, backend)
        spark, start = time_spark(folder, copies, backend)
        check_equal(folder)
    print_table(
        f"{text:.0f} MB of text, {backend}, {WORKERS} workers, the same bytes from both",
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
