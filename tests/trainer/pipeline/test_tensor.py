"""Weights cut among the ranks of a stage: losses, gradients and rows of one process."""

import pytest
from alike_runs import assert_alike, forget_after
from runs import checkpoint_tensors

pytestmark = pytest.mark.slow

KEPT = {"checkpoint__every_steps": 5, "checkpoint__keep_last": 9}


def test_parts_of_weights_train_as_one_process_and_resume_as_one(training):
    """With dropout, whose choices are those of whole weights."""
    one = training.run("one", 1, **KEPT)
    cut = training.run("cut", 2, tensor_parallel=2, **KEPT)
    assert_alike(cut, one)
    (newest,) = (cut / "checkpoints").glob("step-000010")
    assert len(list(newest.glob("*.safetensors"))) == 1, "one rank writes the weights of a stage"
    whole, found = checkpoint_tensors(one), checkpoint_tensors(cut)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in whole.items()
    }
    forget_after(cut, 5)
    assert_alike(training.run("cut", 1, "--resume", **KEPT), one)
    forget_after(one, 5)
    assert_alike(training.run("one", 2, "--resume", tensor_parallel=2, **KEPT), cut)
