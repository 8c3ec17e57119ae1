"""The learning rate is a function of the step."""

import math
from itertools import pairwise

import pytest
import torch

from headrace.schemas.train.optimizer_config import OptimizerConfig, SchedulerConfig
from headrace.trainer.optim.learning_rate import learning_rate


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


def test_linear_falls_in_equal_parts():
    values = rates(SchedulerConfig(type="linear", warmup_steps=2, min_lr=0.2), 6)
    assert values == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4])


def test_warmup_as_a_share_of_the_steps():
    assert rates(SchedulerConfig(warmup_fraction=0.4), 10)[:5] == [0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(("steps", "rise"), [(20, None), (50, 0.1), (5, 0.6)])
def test_one_cycle_is_that_of_torch(steps, rise):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    torch_schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=steps, pct_start=rise or 0.3, cycle_momentum=False
    )
    expected = []
    for _ in range(steps):
        expected.append(torch_schedule.get_last_lr()[0])
        optimizer.step()
        if len(expected) < steps:
            torch_schedule.step()
    scheduler = SchedulerConfig(type="one_cycle", warmup_fraction=rise)
    assert rates(scheduler, steps) == pytest.approx(expected, abs=1e-9)


def test_rms_ratio_is_one_over_the_variation_of_adams_second_moment():
    """Weights of the bias-corrected mean of squares: w_i = (1 - b) b^(t - i) / (1 - b^t)."""
    beta2, steps = 0.95, 40
    optimizer = OptimizerConfig(lr=1.0, beta2=beta2)
    scheduler = SchedulerConfig(type="rms_ratio")
    for step in range(steps):
        t = step + 1
        weights = [(1 - beta2) * beta2 ** (t - i) / (1 - beta2**t) for i in range(1, t + 1)]
        settled = math.sqrt((1 - beta2) / (1 + beta2) / math.fsum(w * w for w in weights))
        assert learning_rate(optimizer, scheduler, step, steps) == pytest.approx(settled)


def test_the_first_step_of_the_rms_ratio_changes_something():
    """qlora-pipe-lite's factor is 0 at its first step, which then changes nothing."""
    assert rates(SchedulerConfig(type="rms_ratio"), 3)[0] > 0


def test_a_forced_rate_overrides_everything():
    scheduler = SchedulerConfig(type="cosine", warmup_steps=2, force_constant_lr=0.3)
    assert rates(scheduler, 4) == [0.3] * 4
    assert not scheduler.has_horizon
    assert SchedulerConfig(warmup_fraction=0.1).has_horizon


def test_two_ways_to_say_warmup_exclude_each_other():
    with pytest.raises(ValueError, match=r"warmup_steps = 3 and warmup_fraction = 0\.1 exclude"):
        SchedulerConfig(warmup_steps=3, warmup_fraction=0.1)
