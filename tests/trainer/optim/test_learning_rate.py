"""The learning rate is a function of the step."""

import math
from itertools import pairwise

import pytest
import torch
import transformers

from headrace.schemas.train.optimizer_config import OptimizerConfig, SchedulerConfig
from headrace.schemas.train.schedules import SCHEDULES
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


def rates_of(make, steps):
    """The rates of a schedule of torch's or transformers' for an optimizer of rate 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = make(optimizer)
    expected = []
    for step in range(steps):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        if step < steps - 1:
            schedule.step()
    return expected


@pytest.mark.parametrize("div", [None, 6.0])
@pytest.mark.parametrize(("steps", "rise"), [(20, None), (50, 0.1), (5, 0.6)])
def test_one_cycle_is_that_of_torch(steps, rise, div):
    changes = {} if div is None else {"div_factor": div}
    expected = rates_of(
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=1.0,
            total_steps=steps,
            pct_start=rise or 0.3,
            cycle_momentum=False,
            **changes,
        ),
        steps,
    )
    scheduler = SchedulerConfig(type="one_cycle", warmup_fraction=rise, **changes)
    assert rates(scheduler, steps) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize(("steps", "warmup", "decay", "floor"), [(40, 4, 10, 0.1), (9, 0, 9, 0)])
def test_warmup_stable_decay_is_that_of_transformers(shape, steps, warmup, decay, floor):
    """Apart from the warmup, which there starts at `min_lr_ratio` in place of lr / warmup."""
    expected = rates_of(
        lambda optimizer: transformers.get_wsd_schedule(
            optimizer, warmup, decay, steps, decay_type=shape, min_lr_ratio=floor
        ),
        steps,
    )
    scheduler = SchedulerConfig(
        type="warmup_stable_decay",
        warmup_steps=warmup,
        decay_steps=decay,
        decay_shape=shape,
        min_lr=floor,
    )
    found = rates(scheduler, steps)
    assert found[warmup:] == pytest.approx(expected[warmup:], abs=1e-12)
    assert found[:warmup] == [(step + 1) / warmup for step in range(warmup)]


def test_a_share_of_the_steps_is_the_fall_of_warmup_stable_decay():
    tenth = rates(SchedulerConfig(type="warmup_stable_decay"), 50)
    assert tenth == rates(SchedulerConfig(type="warmup_stable_decay", decay_steps=5), 50)
    half = rates(SchedulerConfig(type="warmup_stable_decay", decay_fraction=0.5), 50)
    assert half[:26] == [1.0] * 26
    assert half[26] < 1


@pytest.mark.parametrize(("warmup", "floor"), [(0, 0.0), (5, 0.2)])
def test_rex_falls_by_its_formula(warmup, floor):
    steps = 40
    found = rates(SchedulerConfig(type="rex", warmup_steps=warmup, min_lr=floor), steps)
    for step in range(warmup, steps):
        z = (steps - step) / (steps - warmup)
        assert found[step] == pytest.approx(floor + (1 - floor) * z / (0.1 + 0.9 * z), rel=1e-14)
    assert found[:warmup] == [(step + 1) / warmup for step in range(warmup)]


@pytest.mark.parametrize("warmup", [0, 12])
def test_log_sweep_rises_by_one_factor_a_step_from_floor_to_peak(warmup):
    low, high, steps = 1e-10, 10.0, 20
    sweep = warmup or steps
    q = (high / low) ** (1 / (sweep - 1))
    scheduler = SchedulerConfig(type="log_sweep", warmup_steps=warmup, min_lr=low)
    found = rates(scheduler, steps, lr=high)
    expected = [low, *(low * q ** (step - 1) for step in range(1, sweep))]
    assert found == pytest.approx(expected + [high] * (steps - sweep), rel=1e-12)
    with pytest.raises(ValueError, match=r'"log_sweep" starts at min_lr; set it above 0'):
        SchedulerConfig(type="log_sweep")


@pytest.mark.parametrize("kind", ["constant", "cosine", "warmup_stable_decay", "rex"])
def test_a_quadratic_warmup_is_the_square_of_a_linear_one(kind):
    plain = SchedulerConfig(type=kind, warmup_steps=5, min_lr=0.1)
    square = SchedulerConfig(type=kind, warmup_steps=5, min_lr=0.1, warmup_shape="quadratic")
    linear, quadratic = rates(plain, 20), rates(square, 20)
    assert quadratic[:5] == pytest.approx([rate**2 for rate in linear[:5]])
    assert quadratic[5:] == linear[5:]


def test_a_cosine_may_end_before_the_run():
    warmup, steps, share, floor = 4, 30, 0.77, 0.1
    scheduler = SchedulerConfig(
        type="cosine", warmup_steps=warmup, min_lr=floor, fall_fraction=share
    )
    last = int(steps * share)
    for step, rate in enumerate(rates(scheduler, steps)[warmup:], warmup):
        done = (min(step, last) - warmup) / (last - warmup)
        expected = (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)) + floor
        assert rate == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "linear", "div_factor": 6}, r'div_factor = 6\.0 has no meaning .*"linear"'),
        ({"decay_steps": 5}, 'decay_steps = 5 has no meaning .* set type to "warmup_stable_decay"'),
        ({"type": "one_cycle", "warmup_shape": "quadratic"}, "warmup_shape = 'quadratic' has no"),
        ({"type": "rex", "fall_fraction": 0.5}, 'fall_fraction = 0.5 .* set type to "cosine"'),
        (
            {"type": "warmup_stable_decay", "decay_steps": 5, "decay_fraction": 0.5},
            r"decay_steps = 5 and decay_fraction = 0\.5 exclude each other",
        ),
    ],
)
def test_keys_that_a_schedule_does_not_read_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(**settings)


def test_every_schedule_says_whether_it_looks_at_the_end():
    for kind, schedule in SCHEDULES.items():
        scheduler = SchedulerConfig(type=kind, min_lr=1e-3)
        same = rates(scheduler, 20)[:10] == rates(scheduler, 40)[:10]
        assert schedule.has_horizon or same, kind
        assert not schedule.has_horizon or rates(scheduler, 20) != rates(scheduler, 40)[:20], kind


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
