"""On two GPUs, over NCCL: every parallel dimension has the losses of one GPU."""

import pytest
import torch
from runs import checkpoint_tensors, exact_metrics, read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]
STEPS = {"max_steps": 4, "adapter__dropout": 0.0}
KINDS = pytest.mark.parametrize("kind", ["lora", "none"], ids=["LoRA", "full"])


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


def rows(run):
    return [line["rows_sha256"] for line in exact_metrics(run)]


@KINDS
@pytest.mark.parametrize("dimension", ["sequence_parallel", "tensor_parallel"])
def test_two_gpus_that_share_rows_or_weights_equal_one(training, kind, dimension):
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 5e-3)):
        settings = {**STEPS, "adapter__kind": kind, "dtype": dtype}
        one = training.run(f"one-{dtype}", 1, **settings)
        two = training.run(f"two-{dtype}", 2, **settings, **{dimension: 2})
        assert losses(two) == pytest.approx(losses(one), rel=tolerance)
        assert rows(two) == rows(one)


@KINDS
def test_slices_through_two_stages_equal_one_gpu(training, kind):
    settings = {**STEPS, "adapter__kind": kind, "dtype": "float32"}
    one = training.run("one", 1, **settings)
    two = training.run("two", 2, pipeline_stages=2, sequence_slices=4, **settings)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert rows(two) == rows(one)


@KINDS
def test_states_that_replicas_share_or_the_host_holds_change_no_bit(training, kind):
    settings = {**STEPS, "adapter__kind": kind, "gradient_accumulation_steps": 2}
    settings |= {"checkpoint__every_steps": 2}
    plain = training.run("plain", 2, **settings)
    tensors = checkpoint_tensors(plain)
    for name in ("shard", "offload"):
        run = training.run(name, 2, **settings, **{f"optimizer__{name}": True})
        assert exact_metrics(run) == exact_metrics(plain)
        found = checkpoint_tensors(run)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], value) for key, value in tensors.items())
