"""Evaluations and checkpoints come when they are due, and a run ends when it should."""

import math

import pytest
from checkpoints import state

from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.run.cadence import Cadence, Stopwatch, Timer

STEPS, ROWS_PER_EPOCH = 20, 50  # steps of 8 rows, see `state`


def cadence(**tables):
    dataset = {"path": "shards"}
    config = {"model": "m", "output_dir": "o", "datasets": [dataset], "optimizer": {"lr": 1}}
    config |= {"evaluation_datasets": [dataset], "max_steps": 20, **tables}
    return Cadence(TrainConfig.model_validate(config), STEPS, ROWS_PER_EPOCH)


def steps(due):
    return [step for step in range(1, 21) if due(state(step - 1), state(step))]


def test_every_so_many_steps_and_after_the_last():
    due = cadence(evaluation={"every_steps": 6}, checkpoint={"every_steps": 7})
    assert steps(due.evaluates) == [6, 12, 18, 20]
    assert steps(due.saves) == [7, 14, 20]


def test_reports_come_in_intervals_and_wherever_something_else_is_due():
    plan = {"reporting": {"every_steps": 8}, "checkpoint": {"every_steps": 7}}
    assert steps(cadence(**plan).reports) == [7, 8, 14, 16, 20]
    watched = {"spike_factor": 2.0}
    assert steps(cadence(**plan, anomalies=watched).reports) == list(range(1, 21))


def test_losses_of_an_interval_are_remembered_in_order_up_to_a_limit():
    now = state(3).model_copy(update={"recent_losses": [5.0, 4.0]}).after_losses([3.0, 2.0], 3)
    assert (now.loss, now.recent_losses) == (2.0, [4.0, 3.0, 2.0])
    assert now.after_losses([1.0], 0).recent_losses == []


def test_laps_of_a_stopwatch_begin_where_the_last_one_ended():
    times = iter([1.0, 3.0, 3.5])
    stopwatch = Stopwatch(lambda: next(times))
    assert [stopwatch.lap(), stopwatch.lap()] == [2.0, 0.5]


@pytest.mark.parametrize(
    ("every", "expected"),
    [(1, [7, 13, 19]), (0.5, [4, 7, 10, 13, 16, 19]), (0.1, list(range(1, 21)))],
)
def test_every_so_many_epochs_is_the_step_that_reaches_or_passes_the_end(every, expected):
    due = cadence(evaluation={"every_epochs": every, "after_last_step": False})
    assert steps(due.evaluates) == expected


def test_a_new_lowest_loss_is_saved_only_if_the_best_is_kept():
    before, after = state(2), state(3).after_evaluation(1.5)
    assert cadence(checkpoint={"keep_best": True}).saves(before, after)
    assert not cadence().saves(before, after)
    worse = after.model_copy(update={"step": 4}).after_evaluation(1.6)
    assert not cadence(checkpoint={"keep_best": True}).saves(after, worse)


def test_patience_counts_evaluations_since_the_lowest_loss():
    plan = cadence(evaluation={"patience": 2})
    now = state(1)
    ended = []
    for loss in (2.0, 1.8, 1.8, math.nan, 1.7):
        now = now.after_evaluation(loss)
        ended.append(plan.has_ended(now))
    assert ended == [False, False, False, True, False]
    assert (now.best_loss, now.best_step) == (1.7, 1)


def test_what_is_found_before_the_first_step_is_no_candidate():
    now = state(0).after_evaluation(1.0)
    assert (now.evaluation_loss, now.best_loss, now.evaluations_since_best) == (1.0, None, 0)


def test_minutes_start_again_with_each_save():
    now = [0.0]
    timer = Timer(2, lambda: now[0])
    now[0] = 119.0
    assert not timer.is_due()
    now[0] = 120.0
    assert timer.is_due()
    timer.restart()
    assert not timer.is_due()
    assert not Timer(None).is_due()
