"""One process is the reference for every layout: same rows, losses and weights, bit by bit."""

import pytest
import torch
from runs import checkpoint_tensors, exact_metrics, read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(params=["lora", "none"], ids=["LoRA", "full"])
def kind(request):
    return request.param


def test_stages_change_no_bit_and_replicas_only_rounding(training, kind):
    one = training.run("one", 1, adapter__kind=kind)
    reference, losses = checkpoint_tensors(one), exact_metrics(one)
    assert len(losses) == 12
    assert losses[-1]["loss"] < losses[0]["loss"], "nothing was learnt, so nothing is compared"

    for stages in (2, 4):
        run = training.run(f"stages-{stages}", stages, adapter__kind=kind, pipeline_stages=stages)
        assert exact_metrics(run) == losses
        tensors = checkpoint_tensors(run)
        assert tensors.keys() == reference.keys()
        assert all(torch.equal(tensors[name], reference[name]) for name in reference)

    both = training.run(
        "two-by-two", 4, adapter__kind=kind, pipeline_stages=2, gradient_accumulation_steps=2
    )
    rows = [line["rows_sha256"] for line in exact_metrics(both)]
    assert rows == [line["rows_sha256"] for line in losses]
    for line, expected in zip(read_metrics(both), read_metrics(one), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    tensors = checkpoint_tensors(both)
    for name in (name for name in reference if name.startswith("parameter/")):
        difference = torch.linalg.vector_norm(tensors[name] - reference[name])
        assert difference <= 1e-6 * torch.linalg.vector_norm(reference[name]), name


def test_larger_micro_batches_without_read_ahead_see_the_same_rows(training):
    plain = {"adapter__dropout": 0.0}
    one = training.run("one", 1, **plain)
    changes = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "pipeline_stages": 2}
    other = training.run("other", 2, loader__prefetch_batches=0, **changes, **plain)
    for line, expected in zip(read_metrics(other), read_metrics(one), strict=True):
        assert line.get("rows_sha256") == expected.get("rows_sha256")
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_activation_checkpointing_changes_no_bit(training):
    kept = training.run("kept", 2, pipeline_stages=2)
    recomputed = training.run("recomputed", 2, pipeline_stages=2, activation_checkpointing="full")
    assert exact_metrics(recomputed) == exact_metrics(kept)
