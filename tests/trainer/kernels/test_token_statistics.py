"""Entropy and rank of each token come out of the loss's pass over the logits, and are exact."""

import numpy as np
import pytest
import torch
from tiny_families import build, config_of, make_batch, run_on, save_tiny
from transformers import AutoModelForCausalLM

from headrace.kernels import cross_entropy_triton
from headrace.kernels import linear_cross_entropy as chunked
from headrace.kernels.linear_cross_entropy import linear_cross_entropy
from headrace.kernels.token_cross_entropy import token_cross_entropy
from headrace.kernels.token_statistics import TokenStatistics
from headrace.trainer.metrics.token_summary import TokenSample, summarize
from headrace.trainer.stage.micro_batch import MicroBatch

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
    monkeypatch.setattr(cross_entropy_triton, "BLOCK", 32)  # rows are gone over in parts
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


def sample(losses, entropies, ranks, norms, vocabulary=100):
    values = (losses, entropies, ranks, norms)
    return TokenSample(*(np.asarray(v, dtype=np.float32) for v in values), vocabulary)


def test_a_summary_is_over_all_tokens_of_all_replicas():
    random = np.random.default_rng(0)
    losses, entropies = random.gamma(2, size=1000), random.gamma(3, size=1000)
    ranks, norms = random.geometric(0.2, 1000) - 1, random.normal(9, 1, 1000)
    whole = summarize([sample(losses, entropies, ranks, norms)])
    order = random.permutation(1000)
    values = (losses[order], entropies[order], ranks[order], norms[order])
    parts = [sample(*(v[part] for v in values)) for part in (slice(300), slice(300, None))]
    assert summarize(parts) == whole
    losses = losses.astype(np.float32).astype(np.float64)
    assert whole.entropy == pytest.approx(entropies.mean(), rel=1e-6)
    assert whole.normalized_entropy == pytest.approx(entropies.mean() / np.log(100), rel=1e-6)
    assert whole.likelihood == pytest.approx(np.exp(-losses).mean(), rel=1e-9)
    assert whole.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-9)
    assert whole.pseudo_r2 == pytest.approx(1 - losses.mean() / np.log(100), rel=1e-9)
    assert whole.hidden_norm == pytest.approx(norms.mean(), rel=1e-6)
    for k, accuracy in ((1, whole.top1_accuracy), (5, whole.top5_accuracy)):
        assert accuracy == (ranks < k).mean()
    assert whole.top20_accuracy == (ranks < 20).mean() < 1
    assert whole.loss_quantiles["0.5"] == pytest.approx(np.median(losses), rel=1e-9)
    assert whole.loss_quantiles["0.999"] == pytest.approx(np.quantile(losses, 0.999), rel=1e-9)
    histogram = whole.log_loss_histogram
    assert sum(histogram.counts) == 1000 and len(histogram.counts) == 64
    assert np.exp([histogram.low, histogram.high]) == pytest.approx([losses.min(), losses.max()])


def test_certain_tokens_and_losses_that_are_not_numbers_have_a_summary_too():
    certain = summarize([sample([0.0, 0.0], [0.0, 0.0], [0, 0], [1.0, 1.0])])
    assert (certain.perplexity, certain.pseudo_r2, certain.top1_accuracy) == (1, 1, 1)
    lost = summarize([sample([np.nan, 1.0], [np.nan, 1.0], [0, 0], [np.inf, 1.0])])
    assert np.isnan(lost.perplexity) and sum(lost.log_loss_histogram.counts) == 1
    assert summarize([sample([800.0], [0.0], [9], [1.0])]).perplexity == np.inf
    assert summarize([sample([], [], [], [])]) is None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("gemma2", tmp_path_factory.mktemp("statistics") / "gemma2")


@pytest.mark.parametrize("objective", ["cross_entropy", "exponentiated"])
def test_stages_give_transformers_statistics_and_the_same_bits_as_one(model, objective):
    """Of a soft-capped head, under a loss of other logits too."""
    settings = {"kind": objective} | ({"gamma": 1.5} if objective == "exponentiated" else {})
    batch = make_batch()
    side = MicroBatch(
        batch.document_lengths, batch.row_lengths, batch.labels, 1.0, 1.0, 0, wants_statistics=True
    )
    one, two = (
        run_on(build(config_of(model, stages, objective=settings)), batch.ids, side)[-1]
        for stages in (1, 2)
    )
    assert torch.equal(one.statistics.entropy, two.statistics.entropy)
    assert torch.equal(one.statistics.rank, two.statistics.rank)
    assert torch.equal(one.hidden_norms, two.hidden_norms)
    reference = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    output = reference(batch.ids[:1, :7], output_hidden_states=True, use_cache=False)
    logits = output.logits[0].detach()
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    found = one.statistics.entropy[:6]  # the seventh token has no label
    torch.testing.assert_close(found, entropy[:6], rtol=1e-5, atol=1e-5)
    larger = (logits > logits.gather(1, batch.labels[0, :7].clamp(min=0)[:, None])).sum(-1)
    assert torch.equal(one.statistics.rank[:6], larger[:6].int())
    norms = torch.linalg.vector_norm(output.hidden_states[-1][0], dim=-1)
    torch.testing.assert_close(one.hidden_norms[0, :7], norms)
