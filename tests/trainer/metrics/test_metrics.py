"""Metrics: what is kept over a resume, what TensorBoard shows, how a step reads."""

import errno
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from step_metrics import STEP
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from headrace.schemas.errors import OutputError
from headrace.trainer.metrics.answers_log import PromptedAnswer
from headrace.trainer.metrics.histogram import Histogram
from headrace.trainer.metrics.log import MetricsLog
from headrace.trainer.metrics.metrics import (
    AnswerFacts,
    AnswerMetrics,
    EvaluationMetrics,
    LabelMetrics,
    PairMetrics,
    StepMetrics,
    losses_by_source,
    mean_loss,
    pair_metrics,
)
from headrace.trainer.metrics.token_summary import QUANTILES, TokenSample, summarize
from headrace.trainer.objectives.row_loss import PairLoss, RowLoss
from headrace.trainer.run.console_line import console_line, duration
from headrace.trainer.run.step_report import answer_metrics

PAGE = Path(__file__).parents[3] / "docs" / "training.md"
SUMMARY = summarize(
    [TokenSample(*(np.linspace(1, 2, 9, dtype=np.float32) for _ in range(4)), vocabulary=384)]
)
PAIRS = PairMetrics(8, 0.75, 0.5, 0.25, -0.25)
LABELS = LabelMetrics(8, 3, 0.25, 0.5, -0.25, 0.75)
ANSWERS = AnswerMetrics(tokens=23.4, ended=0.75, seconds=1.24)
EVALUATION = EvaluationMetrics(7, "held-out", 2.5, {"books": 2.75}, 999, 3.0, 2.5, None)


def log_steps(directory, resume_point, *steps):
    log = MetricsLog(directory, resume_point)
    for step in steps:
        log.write(replace(STEP, step=step))
    log.close()


def logged(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def scalars(directory):
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_lines_hold_every_field_exactly(tmp_path):
    log = MetricsLog(tmp_path, -1)
    log.write(EVALUATION)
    log.write(replace(STEP, loss=0.1 + 0.2))
    log.write(replace(STEP, token_summary=SUMMARY))
    log.close()
    evaluation, train, summarized = logged(tmp_path)
    assert summarized["token_summary"] == asdict(SUMMARY)
    assert evaluation.pop("kind") == "evaluation"
    assert EvaluationMetrics(**evaluation) == EVALUATION
    assert train.pop("kind") == "train"
    assert StepMetrics(**train) == replace(STEP, loss=0.1 + 0.2)


def test_a_resumed_run_takes_back_what_was_logged_after_its_checkpoint(tmp_path):
    log_steps(tmp_path, -1, 0, 1, 2, 3, 4)
    log_steps(tmp_path, 2, 3)
    assert [line["step"] for line in logged(tmp_path)] == [0, 1, 2, 3]
    assert sorted(scalars(tmp_path)["train/loss"]) == [0, 1, 2, 3]


def test_a_run_that_starts_over_takes_everything_back(tmp_path):
    log_steps(tmp_path, -1, 0, 1)
    log_steps(tmp_path, -1)
    assert logged(tmp_path) == []


@pytest.mark.parametrize("torn", ["{", '{"kind": "train", "step": 2}'])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path, torn):
    log_steps(tmp_path, -1, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    log_steps(tmp_path, 2, 3)
    assert [line["step"] for line in logged(tmp_path)] == [1, 3]


def test_a_damaged_line_is_dropped_with_a_warning_and_its_neighbors_stay(tmp_path, caplog):
    log_steps(tmp_path, -1, 1, 2, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[1] = "\0" * 8 + "\n"
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    log_steps(tmp_path, 3, 4)
    assert [line["step"] for line in logged(tmp_path)] == [1, 3, 4]
    assert "dropped a damaged line" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        b"{}\n",
        b"[1]\n",
        b'{"kind": "train", "step": null}\n',
        b'{"kind": "\xff", "step": 2}\n',
        b"",
    ],
    ids=["no step", "no object", "no number", "no text", "gone"],
)
def test_lines_that_are_lost_are_counted_and_the_others_stay(tmp_path, caplog, damage):
    log_steps(tmp_path, -1, 1, 2, 3)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = damage
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    log_steps(tmp_path, 3, 4)
    assert [line["step"] for line in logged(tmp_path)] == [1, 3, 4]
    assert "the lines of 1 of 3 steps are lost (the first is of step 2)" in caplog.text


class Full:
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named_with_the_file(tmp_path):
    log = MetricsLog(tmp_path, -1)
    log.file.close()
    log.file = Full()
    with pytest.raises(OutputError, match=r"metrics.jsonl: cannot be written \(No space left"):
        log.write(STEP)


def test_a_step_can_be_read_while_the_run_goes_on(tmp_path):
    log = MetricsLog(tmp_path, -1)
    log.write(STEP)
    assert [line["step"] for line in logged(tmp_path)] == [7]
    log.close()


def test_tensorboard_has_exactly_the_tags_that_the_page_lists(tmp_path):
    documented = re.findall(r"^\| `((?:train|evaluation)/[^`]+)`", PAGE.read_text(), re.MULTILINE)
    log = MetricsLog(tmp_path, -1)
    rest = {"pairs": PAIRS, "token_summary": SUMMARY, "labels": LABELS}
    steps = rest | {"answers": ANSWERS, "product_norm_histogram": Histogram.of([1.5, 2.5])}
    log.write(replace(STEP, source_losses={"SOURCE": 2.5}, router_loss=1.25, **steps))
    for _ in range(2):  # the second one has a change
        log.write(replace(EVALUATION, name="NAME", source_losses={"SOURCE": 2.75}, **rest))
    log.write_answers(7, [PromptedAnswer("a", "b", 1, ended=True)])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    texts = [tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]]
    tags = [*events.Tags()["scalars"], *events.Tags()["histograms"], *texts]
    assert f"train/loss_quantile/{QUANTILES[-1]}" in tags
    one_for_all = {re.sub(r"_quantile/0\.\d+$", "_quantile/Q", tag) for tag in tags}
    assert sorted(documented) == sorted(one_for_all)


def test_histograms_reach_tensorboard_as_counts_in_even_bins(tmp_path):
    log = MetricsLog(tmp_path, -1)
    log.write(replace(STEP, token_summary=SUMMARY))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Histograms("train/tokens/hidden_norm_histogram")
    shown = event.histogram_value
    assert (event.step, shown.min, shown.max, shown.num) == (7, 1.0, 2.0, 9)
    assert sum(shown.bucket) == 9 and shown.bucket_limit[-1] == 2.0
    assert shown.sum == pytest.approx(9 * 1.5, rel=0.01)


def test_tensorboard_shows_the_values(tmp_path):
    log = MetricsLog(tmp_path, -1)
    log.write(STEP)
    log.write(EVALUATION)
    log.close()
    shown = scalars(tmp_path)
    assert shown["train/loss"] == {7: pytest.approx(STEP.loss)}
    assert shown["train/tokens_per_second"] == {7: 4096.0}
    assert shown["train/source_loss/code"] == {7: 2.25}
    assert shown["evaluation/held-out/loss"] == {7: 2.5}
    assert shown["evaluation/held-out/source_loss/books"] == {7: 2.75}


def test_a_step_on_pairs_shows_what_became_of_them():
    line = console_line(replace(STEP, cross_entropy=1.5, pairs=PAIRS), 10, 0.0)
    assert "loss 2.3457  ce 1.5000  accuracy  75%  margin 0.500  fill" in line
    line = console_line(replace(STEP, pairs=PAIRS, answers=ANSWERS), 10, 0.0)
    assert "margin 0.500  answers 23 tok,  75% ended, 1.2 s  fill" in line


def test_answers_of_replicas_count_by_number_and_the_slowest_says_how_long_it_took():
    facts = [AnswerFacts(4, 40, 4, 1.5), AnswerFacts(1, 60, 0, 2.5)]
    assert answer_metrics(facts) == AnswerMetrics(tokens=20.0, ended=0.8, seconds=2.5)
    assert answer_metrics([]) is None


def test_pairs_weigh_the_same_whatever_their_length_and_tokens_beside_them():
    """qlora-pipe 1.7: no rewards, margins or accuracy of pairs were logged."""
    rows = [
        RowLoss("a", 30.0, 10, pair=PairLoss(0.5, 2.0, 1.0, 0.25)),
        RowLoss("b", 10.0, 30, pair=PairLoss(1.0, 0.5, 1.0, 0.25)),
    ]
    assert mean_loss(rows) == 0.75 + 0.25 * 1.0
    assert pair_metrics(rows) == PairMetrics(2, 0.5, 0.25, 1.25, 1.0)
    assert losses_by_source(rows) == {"a": 0.5 + 0.25 * 3.0, "b": 1.0 + 0.25 / 3}
    assert pair_metrics([RowLoss("a", 1.0, 1)]) is None


def test_a_step_reads_as_one_line():
    assert console_line(STEP, 1000, 3725.4) == (
        "step    7/1000    1%  epoch 0.25  loss 2.3457  fill  88%  lr 1.50e-04  grad 0.750"
        "  4,096 tok/s  0.50 s/step  left 1:02:05"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.6, "1:00:00"), (360_061, "100:01:01")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_losses_are_weighted_by_tokens_in_each_source_and_in_all():
    rows = [
        RowLoss("code", 30.0, 10),
        RowLoss("books", 8.0, 4),
        RowLoss("code", 10.0, 30),
        RowLoss("masked", 0.0, 0),
    ]
    assert losses_by_source(rows) == {"books": 2.0, "code": 1.0, "masked": 0.0}
    assert mean_loss(rows) == pytest.approx(48 / 44)


def test_the_order_of_rows_does_not_change_a_bit_of_the_loss():
    rows = [RowLoss("all", loss, 1) for loss in [2.0**53, 1.0, 1.0, 1.0]]
    assert mean_loss(rows) == mean_loss(reversed(rows))
