"""Only one rank of a replica ever opens a shard."""

import subprocess

import pytest
from runs import Training, as_toml

pytestmark = pytest.mark.slow

WATCH = """
import os, sys

def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".parquet"):
        with open({log!r}, "a") as file:
            file.write(f"{{os.environ.get('RANK', 'launcher')}} {{arguments[0]}}\\n")

sys.addaudithook(watch)
"""


@pytest.mark.parametrize(
    "cut",
    [
        "pipeline_stages",
        pytest.param("sequence_parallel", marks=pytest.mark.exhaustive),
        pytest.param("tensor_parallel", marks=pytest.mark.exhaustive),
    ],
)
def test_only_one_rank_of_each_replica_opens_shards(
    training: Training, tiny_shards, tmp_path, monkeypatch, cut
):
    """By the real command: only processes that start anew import `sitecustomize`."""
    log = tmp_path / "opened.txt"
    (tmp_path / "sitecustomize.py").write_text(WATCH.format(log=str(log)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    settings = {"output_dir": str(tmp_path / "run"), cut: 2, "max_steps": 3}
    settings |= {"gradient_accumulation_steps": 2}
    sets = [part for key, value in settings.items() for part in ("--set", as_toml(key, value))]
    command = training.command(4, *sets)
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    leaders = {"0", "2"}
    assert {rank for rank, _ in lines} == leaders
    opened = {path for rank, path in lines if rank == "0"}
    assert opened <= {str(path) for path in tiny_shards.glob("*.parquet")}
    assert any("evaluation-" in path for path in opened)
