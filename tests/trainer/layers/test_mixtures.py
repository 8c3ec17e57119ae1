"""Mixtures of experts through real processes: the routers' loss is applied, and is logged."""

import shutil

import pytest
import torch
from runs import checkpoint_tensors, exact_metrics, read_metrics
from tiny_families import save_tiny

from headrace.trainer.layers.router_loss import balance_loss, balance_parts

SETTINGS = {
    "max_steps": 3,
    "adapter__dropout": 0.0,
    "adapter__target_parameters": "experts",
    "scheduler__warmup_steps": 0,
}


@pytest.fixture
def mixture(tiny_model, tmp_path):
    """A tiny Mixtral with the tiny Llama's tokenizer."""
    directory = save_tiny(
        "mixtral", tmp_path / "mixtral", vocab_size=384, max_position_embeddings=256
    )
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


@pytest.mark.slow
def test_the_routers_loss_of_all_stages_is_applied_and_logged(training, mixture):
    model = {"model": str(mixture), **SETTINGS}
    one = training.run("one", 1, **model)
    two = training.run("two", 2, pipeline_stages=2, activation_checkpointing="full", **model)
    assert exact_metrics(two) == exact_metrics(one)
    first, second = (
        [line["router_loss"] for line in read_metrics(run) if line["kind"] == "train"]
        for run in (one, two)
    )
    assert all(1.9 < loss < 4.0 for loss in first), "2 experts of 4: from 2 up to 4"
    assert second == pytest.approx(first, rel=1e-6)
    reference, tensors = checkpoint_tensors(one), checkpoint_tensors(two)
    assert any(".mlp.experts." in name for name in tensors)
    assert all(torch.equal(tensors[name], reference[name]) for name in reference)


def loss_of(logits, real):
    return balance_loss(balance_parts(logits, 2, real, int(real.sum())))


def test_filling_does_not_count_for_the_routers_loss():
    torch.manual_seed(0)
    logits = torch.randn(12, 4, requires_grad=True)
    real = torch.arange(12) < 9
    loss = loss_of(logits, real)
    alone = loss_of(logits[:9], torch.ones(9, dtype=torch.bool))
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    loss.backward()
    assert not logits.grad[9:].any()
    assert logits.grad[:9].any()


def test_the_routers_loss_is_least_where_experts_are_used_alike():
    alike = torch.eye(4).repeat(8, 1) + torch.eye(4).roll(1, 0).repeat(8, 1)
    uneven = torch.tensor([[5.0, 4.0, 0.0, 0.0]]).repeat(32, 1)
    real = torch.ones(32, dtype=torch.bool)
    assert loss_of(alike, real).item() == pytest.approx(2.0)
    assert loss_of(uneven, real).item() > 3.5


def test_a_micro_batch_of_filling_alone_has_no_loss():
    assert loss_of(torch.randn(8, 4), torch.zeros(8, dtype=torch.bool)).item() == 0.0
