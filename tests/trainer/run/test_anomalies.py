"""A step that goes wrong is skipped, noted or ends the run, and the rows of its batch are named."""

import json
import math
import re

import pytest
from background_run import assert_same_tensors
from checkpoints import state
from runs import as_toml, checkpoint_tensors, complete, read_metrics

from headrace.schemas.errors import TrainingError
from headrace.schemas.train.run_config import AnomalyConfig
from headrace.trainer.metrics.outcome import Anomaly
from headrace.trainer.run.anomalies import deal_with, judge
from headrace.trainer.shards.packed_rows import PackedRow

SPIKES = AnomalyConfig(spike_factor=2.0, spike_window=3, on_spike="skip")


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("policy", ["stop", "skip", "continue"])
def test_a_gradient_that_is_not_finite(norm, policy):
    anomaly = judge(AnomalyConfig(on_not_finite=policy), norm, None, [])
    assert (anomaly.what, anomaly.policy) == (f"the gradient's norm is {norm}", policy)
    assert anomaly.forbids_update == (policy != "continue")


@pytest.mark.parametrize(
    ("loss", "recent", "is_spike"),
    [
        (6.1, [3.0, 3.0, 3.0], True),
        (6.0, [3.0, 3.0, 3.0], False),
        (math.nan, [3.0, 3.0, 3.0], True),
        (60.0, [3.0, 3.0], False),
    ],
    ids=["above", "at the limit", "not a number", "too few steps to compare with"],
)
def test_a_loss_above_a_multiple_of_the_mean_is_a_spike(loss, recent, is_spike):
    anomaly = judge(SPIKES, 1.0, loss, recent)
    assert (anomaly is not None and anomaly.policy == "skip") == is_spike


def test_without_a_factor_no_loss_is_a_spike():
    assert judge(AnomalyConfig(), 1.0, 1e9, [1.0] * 50) is None


PLACES = [
    [[PackedRow("books", 11, 5), PackedRow("code", 12, 3)]],
    [[]],
    [[PackedRow("code", 13, 8)]],
]


@pytest.mark.parametrize("policy", ["stop", "skip", "continue"])
def test_rows_and_their_sources_are_written_down_whatever_follows(policy, tmp_path, caplog):
    anomaly = Anomaly("the gradient's norm is nan", policy)
    rows = [row for place in PLACES for rows in place for row in rows]
    if policy == "stop":
        with pytest.raises(
            TrainingError, match=r"books 11, code 12, code 13; all in .*--row-key KEY"
        ):
            deal_with(anomaly, state(4), rows, tmp_path, writes=True)
    else:
        deal_with(anomaly, state(4), rows, tmp_path, writes=True)
        done = "the step was taken" if policy == "continue" else "its update was skipped"
        assert f"{done}. It had 3 rows, first books 11, code 12, code 13" in caplog.text
    (line,) = (tmp_path / "anomalies.jsonl").read_text().splitlines()
    what = {"step": 4, "what": "the gradient's norm is nan", "policy": policy}
    assert json.loads(line) == what | {"rows": [row._asdict() for row in rows]}


@pytest.mark.slow
def test_updates_that_would_not_be_finite_are_skipped_and_their_rows_named(training):
    settings = {"max_steps": 3, "pipeline_stages": 2, "optimizer__gradient_clipping": 0}
    settings |= {"optimizer__lr": 1e30, "scheduler__type": "constant", "scheduler__warmup_steps": 0}
    one = training.run("one", 2, **settings | {"max_steps": 1})
    run = training.run("run", 2, anomalies__on_not_finite="skip", **settings)
    lines = (run / "anomalies.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [2, 3]
    assert all(len(record["rows"]) == 4 for record in records)
    sources = {row["source"] for record in records for row in record["rows"]}
    assert sources <= {"json", "small"} and sources
    ours, expected = checkpoint_tensors(run), checkpoint_tensors(one)
    assert_same_tensors(ours, expected)


@pytest.mark.slow
def test_a_spike_ends_the_run_in_one_line_with_the_rows(training):
    run = training.directory / "spiking"
    sets = {"output_dir": str(run), "optimizer__lr": 0.3, "scheduler__type": "constant"}
    sets |= {"adapter__kind": "none", "adapter__dropout": 0.0}
    sets |= {"scheduler__warmup_steps": 0, "anomalies__on_spike": "stop"}
    sets |= {"anomalies__spike_factor": 1.1, "anomalies__spike_window": 2}
    options = [part for key, value in sets.items() for part in ("--set", as_toml(key, value))]
    command = training.command(1, *options)
    done = complete(command)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    record = json.loads((run / "anomalies.jsonl").read_text())
    assert re.match(rf"error: step {record['step']}: the loss is .* times the mean of the 2", error)
    first = record["rows"][0]
    assert f"It had 4 rows, first {first['source']} {first['row_key']}, " in error
    taken = [line["step"] for line in read_metrics(run) if line["kind"] == "train"]
    assert taken[-1] == record["step"] - 1
