"""The learning rate is a function of the step."""

from itertools import pairwise

import pytest

from headrace.schemas.train_config import OptimizerConfig, SchedulerConfig
from headrace.trainer.optimizer import learning_rate


def rates(scheduler, steps, lr=1.0):
    optimizer = OptimizerConfig(lr=lr)
    return [learning_rate(optimizer, scheduler, step, steps) for step in range(steps)]


def test_constant_stays():
    assert rates(SchedulerConfig(), 4) == [1, 1, 1, 1]


def test_warmup_rises_in_equal_parts_and_reaches_the_rate_in_its_last_step():
    scheduler = SchedulerConfig(warmup_steps=4)
    assert rates(scheduler, 6) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_cosine_falls_from_the_rate_towards_its_floor():
    values = rates(SchedulerConfig(type="cosine", warmup_steps=2, min_lr=0.1), 10)
    assert values[2] == 1
    assert all(later < earlier for earlier, later in pairwise(values[2:]))
    assert values[6] == pytest.approx(0.55)
    assert 0.1 < values[-1] < 0.15


def test_warmup_longer_than_the_run_is_cut_off():
    assert rates(SchedulerConfig(type="cosine", warmup_steps=8), 4) == [0.125, 0.25, 0.375, 0.5]
