"""Losses of tokens and of pairs equal their formulas in float64, in value and gradient."""

import math

import pytest
import torch
from pydantic import ValidationError
from tiny_families import build, config_of, gradients_of, make_batch, run_stages, save_tiny
from torch.nn import functional

from headrace.kernels import linear_cross_entropy as chunked
from headrace.kernels import token_cross_entropy as kernel
from headrace.schemas.train.objective_config import ObjectiveConfig
from headrace.trainer.objectives.pairs import Answers
from headrace.trainer.objectives.registry import objective_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS, HIDDEN, VOCABULARY = 37, 24, 101
WITH_GAMMA = ["focal", "focal_star", "inverse_focal", "exponentiated"]
GAMMAS = [0.5, 1.0, 2.0]


def objective(kind, **settings):
    return ObjectiveConfig.model_validate({"kind": kind, **settings})


def formula(kind, logits, labels, gamma):
    """As it is written down, from the probability of each token."""
    log_p = functional.log_softmax(logits, dim=-1)[torch.arange(len(labels)), labels]
    p = log_p.exp()
    return {
        "focal": lambda: -((1 - p) ** gamma) * log_p,
        "focal_star": lambda: (
            -functional.log_softmax(gamma * logits, -1)[range(len(p)), labels] / gamma
        ),
        "inverse_focal": lambda: -((1 + p) ** gamma) * log_p,
        "exponentiated": lambda: (-log_p) ** gamma / gamma,
    }[kind]()


def head_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::5] = chunked.IGNORED_LABEL
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("rows", [7, 1000])
def test_any_function_of_the_tokens_losses_has_its_exact_gradient(
    monkeypatch, rows, trained, triton
):
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", rows * VOCABULARY)
    hidden, weight, labels = head_inputs()
    factors = torch.linspace(-2, 3, TOKENS, device=DEVICE)
    shape = {"logit_scale": 0.7, "softcap": 3.0}
    results = []
    for function, dtype, settings in (
        (kernel.token_cross_entropy, torch.float32, {"triton": triton}),
        (kernel.token_cross_entropy_reference, torch.float64, {}),
    ):
        h = hidden.to(dtype, copy=True).requires_grad_()
        w = weight.to(dtype, copy=True).requires_grad_(trained)
        losses = function(h, w, labels, **shape, **settings)
        (losses * factors * losses.detach().sqrt()).sum().backward()
        results.append([losses.detach(), h.grad, w.grad if trained else h.grad])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", WITH_GAMMA)
def test_losses_of_tokens_equal_their_formulas(kind, gamma):
    hidden, weight, labels = head_inputs()
    trained, goal = labels >= 0, objective_of(objective(kind, gamma=gamma))
    ours, expected = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    factor = goal.logit_factor
    losses = kernel.token_cross_entropy(ours, weight, labels, logit_scale=factor)
    adjusted = goal.adjust(losses)
    adjusted.sum().backward()
    reference = formula(kind, (expected @ weight.double().T)[trained], labels[trained], gamma)
    reference.sum().backward()
    torch.testing.assert_close(adjusted[trained].double(), reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), expected.grad, rtol=1e-4, atol=1e-6)
    assert (adjusted[~trained] == 0).all()


@pytest.mark.parametrize("kind", WITH_GAMMA)
def test_tokens_that_are_certain_or_masked_have_finite_gradients(kind):
    losses = torch.tensor([0.0, 1e-9, 1e-30, 3.0], requires_grad=True)
    objective_of(objective(kind, gamma=0.5)).adjust(losses).sum().backward()
    assert losses.grad.isfinite().all()
    assert losses.grad[0] == 0 or kind == "focal_star"


@pytest.mark.parametrize("kind", WITH_GAMMA)
def test_there_is_no_default_gamma_to_divide_by_zero_with(kind):
    """qlora-pipe 3.1.13: focal-star with its default gamma of 0."""
    with pytest.raises(ValidationError, match="needs a gamma"):
        objective(kind)
    with pytest.raises(ValidationError, match="greater than 0"):
        objective(kind, gamma=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 2.0}, 'gamma has no meaning with kind = "cross_entropy"'),
        ({"kind": "focal", "gamma": 2.0, "beta": 0.2}, "beta has no meaning"),
        ({"kind": "orpo", "loss": "ipo"}, "loss has no meaning"),
        ({"kind": "dpo", "loss": "ipo", "label_smoothing": 0.1}, "label_smoothing = 0.1"),
    ],
)
def test_settings_of_another_objective_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ObjectiveConfig.model_validate(settings)


def answers(seed, *, reference=True):
    generator = torch.Generator().manual_seed(seed)
    values = -30 * torch.rand(4, generator=generator)
    before = -30 * torch.rand(4, generator=generator) if reference else None
    return Answers(values, before, torch.tensor([3.0, 11.0, 7.0, 2.0]))


def pair_formula(goal, c, r, rc, rr, tokens):
    """The loss of one pair, in Python's own numbers."""

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    if goal.kind == "orpo":
        odds = [math.exp(x / tokens) / (1 - math.exp(x / tokens)) for x in (c, r)]
        return -goal.beta * math.log(sigmoid(math.log(odds[0] / odds[1])))
    margin = goal.beta * ((c - rc) - (r - rr))
    if goal.loss == "hinge":
        return max(0.0, 1 - margin)
    if goal.loss == "ipo":
        return (margin / goal.beta / tokens - 1 / (2 * goal.beta)) ** 2
    if goal.loss == "apo_zero":
        return 1 - sigmoid(goal.beta * (c - rc)) + sigmoid(goal.beta * (r - rr))
    wrong = goal.label_smoothing
    return -(1 - wrong) * math.log(sigmoid(margin)) - wrong * math.log(sigmoid(-margin))


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "dpo", "beta": 0.3},
        {"kind": "dpo", "label_smoothing": 0.2},
        {"kind": "dpo", "loss": "hinge"},
        {"kind": "dpo", "loss": "ipo", "beta": 0.5},
        {"kind": "dpo", "loss": "apo_zero"},
        {"kind": "orpo", "beta": 0.25},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_losses_of_pairs_equal_their_formulas(settings):
    goal = ObjectiveConfig.model_validate(settings)
    chosen, rejected = answers(1), answers(2)
    ours = objective_of(goal).compare(chosen, rejected)
    for index, tokens in enumerate(chosen.tokens.tolist()):
        c, rc, r, rr = (
            side[index].item()
            for answer in (chosen, rejected)
            for side in (answer.log_probability, answer.reference)
        )
        expected = pair_formula(goal, c, r, rc, rr, tokens)
        assert ours.loss[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("objectives") / "llama")


@pytest.mark.parametrize("kind", ["focal", "focal_star"])
def test_packed_rows_have_the_same_bits_in_two_stages_and_log_their_cross_entropy(model, kind):
    batch, goal = make_batch(), {"objective": {"kind": kind, "gamma": 1.5}}
    adapter = {"kind": "lora", "rank": 4, "dropout": 0.1}
    runs = []
    for stages in (1, 2):
        built = build(config_of(model, stages, adapter, **goal))
        for part in built:
            part.stage.train()
        loss, losses, _ = run_stages(built, batch, seed=3)
        runs.append((loss, losses, gradients_of(built)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert all(torch.equal(runs[0][2][name], gradient) for name, gradient in runs[1][2].items())
    plain = build(config_of(model, 1, adapter))
    plain[0].stage.train()
    loss, losses, _ = run_stages(plain, batch, seed=3)
    torch.testing.assert_close(runs[0][1], losses)
    assert runs[0][0] != pytest.approx(loss, rel=1e-2)
