"""One training process that writes down each shard it opens: `watched_rank.py LOG ARGUMENTS...`."""

import os
import sys
from pathlib import Path

from headrace.trainer.main import main

log, *arguments = sys.argv[1:]


def watch(event: str, values: tuple[object, ...]) -> None:
    """Python's `open`, which the reader uses; opens from C++ are not seen."""
    if event == "open" and str(values[0]).endswith(".parquet"):
        with Path(log).open("a") as file:
            file.write(f"{os.environ['RANK']} {values[0]}\n")


sys.addaudithook(watch)
sys.exit(main(arguments))
