"""Only the first stage of a pipeline group ever opens a shard."""

import pytest
from runs import Training, as_toml, run_ranks

pytestmark = pytest.mark.slow


def test_only_first_stages_open_shards(training: Training, tiny_shards, tmp_path):
    log = tmp_path / "opened.txt"
    settings = {"output_dir": str(tmp_path / "run"), "pipeline_stages": 2, "max_steps": 3}
    settings |= {"gradient_accumulation_steps": 2}
    sets = [part for key, value in settings.items() for part in ("--set", as_toml(key, value))]
    run_ranks("watched_rank.py", 4, log, "--config", training.config, *sets)
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    leaders = {"0", "2"}
    assert {rank for rank, _ in lines} == leaders
    opened = {path for rank, path in lines if rank == "0"}
    assert opened <= {str(path) for path in tiny_shards.glob("*.parquet")}
    assert any("evaluation-" in path for path in opened)
