"""Steps and evaluations of one process, seen from inside."""

import gc
import json
import logging
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from built_stages import build_stage
from checkpoints import state

from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.feed import Feed
from headrace.trainer.batches.loader_builder import build_train_loader
from headrace.trainer.metrics.log import MetricsLog
from headrace.trainer.metrics.metrics import EvaluationMetrics
from headrace.trainer.order.data_history import open_history
from headrace.trainer.order.position import Position
from headrace.trainer.order.run_length import find_run_length
from headrace.trainer.pipeline.engine import StageEngine
from headrace.trainer.preflight import check
from headrace.trainer.run import evaluation_sets, run_log
from headrace.trainer.run.evaluation import evaluate
from headrace.trainer.run.evaluation_sets import build_evaluation_sets
from headrace.trainer.run.open_session import warn_of_long_warmup
from headrace.trainer.run.run_log import run_evaluation

ROWS_PER_CALL = 4


@pytest.fixture
def opened(training, layout, monkeypatch):
    """Config, inputs and engine of a run with these settings."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # DeepSpeed wants it
    monkeypatch.setattr(evaluation_sets, "EVALUATION_MICRO_BATCHES", ROWS_PER_CALL)

    def opened(*settings):
        config = load_config(TrainConfig, training.config, settings)
        built = build_stage(config, 0, layout.device)
        return config, check(config, 1), StageEngine([built.stage], config, layout)

    return opened


def trained_tokens(shards, rows):
    """Of the first evaluation rows: all but the first token of each document."""
    table = pq.read_table(shards / "evaluation-00000.parquet")
    lengths = table["document_lengths"].slice(0, rows).to_pylist()
    return sum(length - 1 for row in lengths for length in row)


@pytest.mark.parametrize("rows", [1, ROWS_PER_CALL, ROWS_PER_CALL + 1])
def test_evaluation_counts_the_last_batch_and_a_single_one(opened, layout, tiny_shards, rows):
    config, inputs, engine = opened(f"evaluation_datasets.0.max_rows={rows}")
    (result,) = evaluate(build_evaluation_sets(config, inputs, layout), engine, layout, 0)
    assert result.trained_tokens == trained_tokens(tiny_shards, rows)
    assert result.loss > 0
    assert set(result.source_losses) <= {"json", "small"}


def test_sets_weigh_by_their_tokens_and_are_written_down_by_name(monkeypatch, tmp_path):
    small, large = (
        EvaluationMetrics(7, name, loss, {}, tokens, 0.1, loss, None)
        for name, loss, tokens in (("small", 5.0, 10), ("large", 1.0, 30))
    )
    monkeypatch.setattr(run_log, "evaluate", lambda *_: [small, large])
    log = MetricsLog(tmp_path, -1)
    session = SimpleNamespace(
        optimizer=torch.optim.AdamW([torch.zeros(1)]),
        built=SimpleNamespace(trained=[]),
        evaluation_sets=[],
        prompted=None,
        engine=None,
        log=log,
    )
    after = run_evaluation(session, None, state(7))
    log.close()
    assert (after.evaluation_loss, after.best_loss, after.best_step) == (2.0, 2.0, 7)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["name"], line["loss"]) for line in lines] == [("small", 5.0), ("large", 1.0)]


def test_a_step_neither_collects_garbage_nor_logs_a_line_for_each_batch(
    opened, layout, monkeypatch, caplog
):
    config, inputs, engine = opened()
    data_history = open_history(config, inputs, [], 0)
    run_length = find_run_length(config, inputs, data_history, 0, Position())
    feed = Feed(
        layout, build_train_loader(config, inputs, layout, data_history, run_length.stop_row)
    )
    for module, name in ((gc, "collect"), (torch.cuda, "empty_cache"), (torch.cuda, "synchronize")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("called in a step"))
    with caplog.at_level(logging.DEBUG):
        losses = engine.forward_backward(feed.next(), 0)
    assert len(losses.rows) == 4
    assert caplog.records == []


@pytest.mark.parametrize(("steps", "said"), [(9, True), (10, False)])
def test_a_warmup_that_the_run_does_not_get_through_is_told(steps, said, caplog):
    config = SimpleNamespace(scheduler=SimpleNamespace(warmup_steps=10))
    with caplog.at_level(logging.INFO):
        warn_of_long_warmup(config, steps)
    assert ("never reaches optimizer.lr" in caplog.text) is said
