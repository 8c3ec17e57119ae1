"""Entropy and rank of each token come out of the loss's pass over the logits, and are exact."""

import pytest
import torch

from headrace.kernels import cross_entropy_rows
from headrace.kernels import linear_cross_entropy as chunked
from headrace.kernels.linear_cross_entropy import linear_cross_entropy
from headrace.kernels.token_cross_entropy import token_cross_entropy
from headrace.kernels.token_statistics import TokenStatistics

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS, HIDDEN, VOCABULARY = 19, 24, 101


def inputs(scale=1.0):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) * scale
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::2] = (hidden @ weight.T).argmax(1)[::2]  # some that the model would choose
    labels[::5] = chunked.IGNORED_LABEL
    return hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE)


@pytest.fixture(params=["torch", "triton"])
def triton(request, monkeypatch):
    monkeypatch.setattr(cross_entropy_rows, "BLOCK", 32)  # rows are gone over in parts
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", 7 * VOCABULARY)
    return request.param == "triton"


def expected(hidden, weight, labels, softcap=None):
    """In float64, by sorting."""
    logits = chunked.shaped_logits(hidden.double() @ weight.double().T, 1.0, softcap)
    shares = logits.softmax(-1)
    places = logits.argsort(-1, descending=True).argsort(-1)
    return -(shares * shares.log()).sum(-1), places.gather(1, labels.clamp(min=0)[:, None])[:, 0]


def assert_equal(found, entropy, rank, labels):
    trained = labels != chunked.IGNORED_LABEL
    torch.testing.assert_close(
        found.entropy[trained].double(), entropy[trained], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(found.rank[trained].long(), rank[trained])
    assert (rank[trained] == 0).any() and (rank[trained] > 20).any()


@pytest.mark.parametrize("scale", [0.3, 2.0])
@pytest.mark.parametrize("differentiated", [True, False], ids=["in training", "in evaluation"])
def test_they_equal_float64_and_change_neither_loss_nor_gradient(triton, differentiated, scale):
    hidden, weight, labels = inputs(scale)
    hidden.requires_grad_(differentiated)
    found = TokenStatistics.empty(TOKENS, DEVICE)
    loss, losses = linear_cross_entropy(hidden, weight, labels, triton=triton, statistics=found)
    plain, plain_losses = linear_cross_entropy(hidden, weight, labels, triton=triton)
    assert_equal(found, *expected(hidden.detach(), weight, labels), labels)
    assert torch.equal(loss, plain) and torch.equal(losses, plain_losses)
    if differentiated:
        gradients = [torch.autograd.grad(value, hidden)[0] for value in (loss, plain)]
        assert torch.equal(*gradients)


def test_losses_of_single_tokens_come_with_them_too_and_with_a_soft_cap(triton):
    hidden, weight, labels = inputs()
    found = TokenStatistics.empty(TOKENS, DEVICE)
    settings = {"softcap": 5.0, "triton": triton}
    token_cross_entropy(hidden, weight, labels, **settings, statistics=found)
    assert_equal(found, *expected(hidden, weight, labels, softcap=5.0), labels)
