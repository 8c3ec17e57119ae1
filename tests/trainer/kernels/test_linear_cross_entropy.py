"""The chunked head and loss equal plain torch, in value and gradient; in Triton as well.

Without a GPU, Triton's interpreter runs the kernel.
"""

import pytest
import torch

from headrace.kernels import linear_cross_entropy as kernel
from headrace.trainer.stage.head_loss import LogitShape, head_loss, head_token_losses

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS, HIDDEN, VOCABULARY = 37, 24, 101
SHAPES = [(1.0, None), (0.7, None), (1.0, 3.0), (0.7, 3.0)]  # logit scale, soft-cap


@pytest.fixture(params=["torch", "triton"])
def triton(request):
    return request.param == "triton"


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::5] = kernel.IGNORED_LABEL
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


def run(function, hidden, weight, labels, scale, **settings):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, token_losses = function(hidden, weight, labels, scale, **settings)
    (loss * 3).backward()
    return loss.detach(), token_losses, hidden.grad, weight.grad


@pytest.mark.parametrize("rows", [1, 7, TOKENS, 1000])
def test_equals_the_float64_reference_for_any_chunk(monkeypatch, rows, triton):
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", rows * VOCABULARY)
    hidden, weight, labels = inputs()
    ours = run(kernel.linear_cross_entropy, hidden, weight, labels, 0.25, triton=triton)
    twin = kernel.linear_cross_entropy_reference
    expected = run(twin, hidden.double(), weight.double(), labels, 0.25)
    for value, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), reference.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("logit_scale", "softcap"), SHAPES)
def test_shaped_logits_equal_the_float64_reference(logit_scale, softcap, triton):
    shape = {"logit_scale": logit_scale, "softcap": softcap}
    hidden, weight, labels = inputs()
    ours = run(kernel.linear_cross_entropy, hidden, weight, labels, 0.25, triton=triton, **shape)
    twin = kernel.linear_cross_entropy_reference
    expected = run(twin, hidden.double(), weight.double(), labels, 0.25, **shape)
    for value, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), reference.double(), rtol=1e-5, atol=1e-6)


def test_a_row_longer_than_a_block_is_gone_over_in_parts(monkeypatch):
    from headrace.kernels import cross_entropy_triton

    monkeypatch.setattr(cross_entropy_triton, "BLOCK", 32)
    hidden, weight, labels = inputs()
    weight *= 30  # logits in the hundreds, whose exponentials float32 does not hold
    ours = run(kernel.linear_cross_entropy, hidden, weight, labels, 0.25, triton=True)
    twin = kernel.linear_cross_entropy_reference
    expected = run(twin, hidden.double(), weight.double(), labels, 0.25)
    for value, reference in zip(ours, expected, strict=True):
        error = torch.linalg.vector_norm(value.double() - reference)
        assert error < 1e-4 * torch.linalg.vector_norm(reference)


def test_bfloat16_is_as_near_to_float32_as_its_twin(triton):
    hidden, weight, labels = inputs(torch.bfloat16)
    ours = run(kernel.linear_cross_entropy, hidden, weight, labels, 0.25, triton=triton)
    twin = kernel.linear_cross_entropy_reference
    expected = run(twin, hidden.float(), weight.float(), labels, 0.25)
    for value, reference in zip(ours, expected, strict=True):
        error = torch.linalg.vector_norm(value.float() - reference)
        assert error < 1e-2 * torch.linalg.vector_norm(reference)


def test_ignored_tokens_have_no_loss_and_no_gradient(triton):
    hidden, weight, labels = inputs()
    _, token_losses, hidden_grad, _ = run(
        kernel.linear_cross_entropy, hidden, weight, labels, 1.0, triton=triton
    )
    ignored = labels == kernel.IGNORED_LABEL
    assert (token_losses[ignored] == 0).all()
    assert (hidden_grad[ignored] == 0).all()
    assert (token_losses[~ignored] > 0).all()


def test_a_frozen_head_gets_no_gradient(triton):
    hidden, weight, labels = inputs()
    hidden.requires_grad_()
    kernel.linear_cross_entropy(hidden, weight, labels, triton=triton)[0].backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_without_gradients_only_the_losses_are_computed(triton):
    hidden, weight, labels = inputs()
    with torch.no_grad():
        loss, token_losses = kernel.linear_cross_entropy(hidden, weight, labels, triton=triton)
    expected, losses = kernel.linear_cross_entropy_reference(hidden, weight, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(token_losses, losses)


@pytest.mark.parametrize(("scale", "softcap"), SHAPES)
def test_a_models_head_is_fused_with_its_soft_cap_and_scale(monkeypatch, scale, softcap):
    """Gemma 2's, Cohere's and Granite's heads: losses and gradients are those of whole logits."""
    hidden, weight, labels = inputs()
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, device=DEVICE)
    head.weight.data.copy_(weight)
    shape = LogitShape(scale, softcap)
    monkeypatch.setattr(head, "forward", lambda x: pytest.fail("the head ran by itself"))
    for whole in (head_loss, summed):
        run_hidden = hidden.clone().requires_grad_()
        head.weight.grad = None
        loss, token_losses = whole(head, run_hidden, labels, 0.5, shape)
        loss.backward()
        expected = run(
            kernel.linear_cross_entropy_reference, hidden.double(), weight.double(), labels, 1 / 6,
            logit_scale=scale, softcap=softcap,
        )  # fmt: skip
        found = (token_losses, run_hidden.grad, head.weight.grad)
        for ours, theirs in zip(found, expected[1:], strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


def summed(head, hidden, labels, scale, shape):
    losses = head_token_losses(head, hidden, labels, shape)
    return losses.sum() * scale, losses.detach()
