"""Only the first stage of a pipeline group ever opens a shard."""

from dataclasses import replace

import pytest
from runs import Training, complete_cold

pytestmark = pytest.mark.slow

WATCH = """
import os, sys

def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".parquet"):
        with open({log!r}, "a") as file:
            file.write(f"{{os.environ.get('RANK', 'launcher')}} {{arguments[0]}}\\n")

sys.addaudithook(watch)
"""


def test_only_first_stages_open_shards(training: Training, tiny_shards, tmp_path, monkeypatch):
    log = tmp_path / "opened.txt"
    (tmp_path / "sitecustomize.py").write_text(WATCH.format(log=str(log)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    watched = replace(training, complete=complete_cold)  # which imports `sitecustomize`
    watched.run("watched", 4, pipeline_stages=2, gradient_accumulation_steps=2, max_steps=3)
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    leaders = {"0", "2"}
    assert {rank for rank, _ in lines} == leaders
    opened = {path for rank, path in lines if rank == "0"}
    assert opened <= {str(path) for path in tiny_shards.glob("*.parquet")}
    assert any("evaluation-" in path for path in opened)
