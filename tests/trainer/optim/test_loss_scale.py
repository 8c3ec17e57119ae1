"""Training in float16: a loss that is scaled, over stages and through checkpoints."""

import math

import pytest
import torch
from pydantic import ValidationError
from runs import checkpoint_tensors, exact_metrics, read_metrics
from tiny_families import config_of

from headrace.schemas.train.run_state import read_run_state, write_run_state
from headrace.trainer.optim.loss_scale import FIRST, LARGEST, STEPS_TO_GROW, LossScale


def test_an_overflow_halves_the_scale_and_many_steps_without_double_it():
    assert LossScale(8.0, 5).after(math.inf) == LossScale(4.0)
    assert LossScale(8.0, 5).after(math.nan) == LossScale(4.0)
    assert LossScale(8.0, 5).after(1.0) == LossScale(8.0, 6)
    assert LossScale(8.0, STEPS_TO_GROW - 1).after(1.0) == LossScale(16.0)
    assert LossScale(LARGEST, STEPS_TO_GROW - 1).after(1.0) == LossScale(LARGEST)


def test_a_gradient_that_overflows_without_a_scale_is_an_anomaly_like_any_other():
    assert not LossScale(1.0).overflows(math.inf)
    assert LossScale(2.0).overflows(math.inf)
    assert not LossScale(2.0).overflows(3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": {"kind": "none"}}, 'use "lora", or dtype = "bfloat16"'),
        ({"optimizer": {"type": "adamw_kahan", "lr": 1e-3}}, "float16 loses small updates"),
    ],
)
def test_weights_in_float16_are_not_trained(settings, message):
    with pytest.raises(ValidationError, match=message):
        config_of("unused", **{"adapter": {"kind": "lora"}, "dtype": "float16"} | settings)


@pytest.mark.slow
def test_a_run_is_near_float32_and_resumes_over_two_stages_with_the_same_bits(training):
    settings = {"max_steps": 4, "checkpoint__every_steps": 2}
    exact = training.run("exact", 1, **settings, dtype="float32")
    one = training.run("one", 1, **settings, dtype="float16")
    ours, theirs = (
        [line["loss"] for line in read_metrics(run) if line["kind"] == "evaluation"]
        for run in (one, exact)
    )
    assert ours == pytest.approx(theirs, rel=2e-3)
    assert ours[-1] < ours[0]
    state = read_run_state(one / "checkpoints" / "step-000004")
    assert (state.loss_scale, state.loss_scale_steps) == (FIRST, 4)

    lines, wanted = exact_metrics(one), checkpoint_tensors(one)
    (one / "checkpoints" / "step-000004").rename(one / "kept")
    training.run("one", 2, "--resume", **settings, dtype="float16", pipeline_stages=2)
    assert exact_metrics(one) == lines
    resumed = checkpoint_tensors(one)
    assert all(torch.equal(resumed[name], wanted[name]) for name in wanted)

    # a scale that no gradient fits: the next steps halve it, and change nothing else
    last = one / "checkpoints" / "step-000004"
    write_run_state(last, read_run_state(last).with_loss_scale(2.0**60, 1999))
    settings = {"max_steps": 6, "checkpoint__every_steps": 2, "pipeline_stages": 2}
    training.run("one", 2, "--resume", "--data-changed", "continue", **settings, dtype="float16")
    state = read_run_state(one / "checkpoints" / "step-000006")
    assert (state.step, state.loss_scale, state.loss_scale_steps) == (6, 2.0**58, 0)
    assert "gradients overflow float16" in (one / "anomalies.jsonl").read_text()
    after = checkpoint_tensors(one)
    trained = [name for name in after if "lora" in name and "exp_avg" not in name]
    assert trained
    assert all(torch.equal(after[name], resumed[name]) for name in trained)
