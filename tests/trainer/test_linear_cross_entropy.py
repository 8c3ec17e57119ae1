"""The chunked head and loss equal plain torch, in value and gradient."""

import pytest
import torch

from headrace.kernels import linear_cross_entropy as kernel

TOKENS, HIDDEN, VOCABULARY = 37, 24, 101


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::5] = kernel.IGNORED_LABEL
    return hidden.to(dtype), weight.to(dtype), labels


def run(function, hidden, weight, labels, scale):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, token_losses = function(hidden, weight, labels, scale)
    (loss * 3).backward()
    return loss.detach(), token_losses, hidden.grad, weight.grad


@pytest.mark.parametrize("rows", [1, 7, TOKENS, 1000])
def test_equals_the_float64_reference_for_any_chunk(monkeypatch, rows):
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", rows * VOCABULARY)
    hidden, weight, labels = inputs()
    ours = run(kernel.linear_cross_entropy, hidden, weight, labels, 0.25)
    twin = kernel.linear_cross_entropy_reference
    expected = run(twin, hidden.double(), weight.double(), labels, 0.25)
    for value, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), reference.double(), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_as_near_to_float32_as_its_twin():
    hidden, weight, labels = inputs(torch.bfloat16)
    ours = run(kernel.linear_cross_entropy, hidden, weight, labels, 0.25)
    twin = kernel.linear_cross_entropy_reference
    expected = run(twin, hidden.float(), weight.float(), labels, 0.25)
    for value, reference in zip(ours, expected, strict=True):
        error = torch.linalg.vector_norm(value.float() - reference)
        assert error < 1e-2 * torch.linalg.vector_norm(reference)


def test_ignored_tokens_have_no_loss_and_no_gradient():
    hidden, weight, labels = inputs()
    _, token_losses, hidden_grad, _ = run(kernel.linear_cross_entropy, hidden, weight, labels, 1.0)
    ignored = labels == kernel.IGNORED_LABEL
    assert (token_losses[ignored] == 0).all()
    assert (hidden_grad[ignored] == 0).all()
    assert (token_losses[~ignored] > 0).all()


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels = inputs()
    hidden.requires_grad_()
    kernel.linear_cross_entropy(hidden, weight, labels)[0].backward()
    assert hidden.grad is not None
    assert weight.grad is None
