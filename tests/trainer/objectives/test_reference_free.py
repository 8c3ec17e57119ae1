"""CPO, SimPO and DFT, which need no reference: TRL's formulas in float64, over 1 and 2 stages."""

import pytest
import torch
from pair_cases import RANK, move, save_model
from pair_rows import PAIRS
from pydantic import ValidationError
from tiny_families import (
    build,
    config_of,
    gradients_of,
    make_batch,
    run_micro_batch,
    run_stages,
)
from torch.nn import functional

from headrace.schemas.train.objective_config import ObjectiveConfig
from headrace.schemas.train.objectives import OBJECTIVES
from headrace.trainer.batches.pair_batch import make_pair_batch
from headrace.trainer.objectives.pairs import Answers
from headrace.trainer.objectives.registry import objective_of
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.stage.micro_batch import MicroBatch

SETTINGS = [
    {"kind": "cpo", "beta": 0.3},
    {"kind": "cpo", "label_smoothing": 0.2, "sft_weight": 0.5},
    {"kind": "cpo", "loss": "hinge"},
    {"kind": "cpo", "loss": "ipo", "beta": 0.5},
    {"kind": "simpo", "beta": 2.0, "gamma": 0.5},
    {"kind": "simpo", "beta": 2.5, "gamma": 1.4, "label_smoothing": 0.1, "sft_weight": 1.0},
]
LENGTH = 24


def named(settings):
    return "-".join(map(str, settings.values()))


def by_trl(goal, chosen, rejected, chosen_tokens, rejected_tokens):
    """`CPOTrainer.cpo_loss`: losses and both rewards, from sums of log-probabilities."""
    beta = goal.beta
    if goal.kind == "simpo" or goal.loss == "ipo":
        chosen, rejected = chosen / chosen_tokens, rejected / rejected_tokens
    logits = chosen - rejected
    if goal.kind == "simpo":
        logits = logits - goal.gamma / beta
    if goal.loss == "hinge":
        losses = torch.relu(1 - beta * logits)
    elif goal.loss == "ipo":
        losses = (logits - 1 / (2 * beta)) ** 2
    else:
        wrong = goal.label_smoothing
        losses = -functional.logsigmoid(beta * logits) * (1 - wrong)
        losses = losses - functional.logsigmoid(-beta * logits) * wrong
    return losses, beta * chosen, beta * rejected


@pytest.mark.parametrize("settings", SETTINGS, ids=named)
def test_losses_rewards_and_gradients_of_pairs_are_those_of_trl(settings):
    goal, generator = ObjectiveConfig.model_validate(settings), torch.Generator().manual_seed(1)
    sums = [-30 * torch.rand(4, generator=generator) for _ in range(2)]
    tokens = [torch.tensor([3.0, 11.0, 7.0, 2.0]), torch.tensor([5.0, 4.0, 9.0, 1.0])]
    mine = [value.clone().requires_grad_() for value in sums]
    theirs = [value.double().requires_grad_() for value in sums]
    sides = [Answers(value, None, count) for value, count in zip(mine, tokens, strict=True)]
    found = objective_of(goal).compare(*sides)
    expected = by_trl(goal, *theirs, *(count.double() for count in tokens))
    for ours, reference in zip(vars(found).values(), expected, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-6)
    found.loss.sum().backward()
    expected[0].sum().backward()
    for ours, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("reference-free") / "model")


def step(model, stages, settings):
    """The last stage's output of a step on pairs, its gradients, and the batch."""
    config = config_of(model, stages, {"kind": "lora", "rank": RANK}, objective=settings)
    built = build(config)
    for part in built:
        part.stage.train()
    move("lora", [(item.name, item.parameter) for part in built for item in part.trained])
    batch = make_pair_batch([[[pair] for pair in PAIRS]], LENGTH, Position(), OverlongCount())
    micro_batch = MicroBatch(
        document_lengths=batch.document_lengths[0],
        row_lengths=batch.row_lengths[0],
        labels=batch.labels[0].long(),
        loss_scale=1 / len(PAIRS),
        router_scale=1.0,
        seed=0,
        extras=batch.extras[0],
        chosen_scale=1 / batch.chosen_tokens,
    )
    output = run_micro_batch(built, batch.input_ids[0], micro_batch)[-1]
    return output, gradients_of(built), batch


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[-1]], ids=named)
def test_a_step_on_pairs_minimizes_the_formula_and_two_stages_give_the_bits_of_one(model, settings):
    one, gradients, batch = step(model, 1, settings)
    two, others, _ = step(model, 2, settings)
    assert torch.equal(one.value, two.value)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert any(gradient.any() for gradient in gradients.values())

    goal, losses = ObjectiveConfig.model_validate(settings), one.token_losses.double()
    sums, tokens = -losses.sum(1), (batch.labels[0] >= 0).sum(1).double()
    half = len(PAIRS)
    expected, *_ = by_trl(goal, sums[:half], sums[half:], tokens[:half], tokens[half:])
    beside = goal.sft_weight * losses[:half].sum() / tokens[:half].sum()
    assert one.value.item() == pytest.approx((expected.mean() + beside).item(), rel=1e-5)


def test_tokens_of_dft_weigh_their_probability_without_a_gradient_through_it(model):
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    labels, ours, theirs = torch.arange(7), logits.clone(), logits.double()
    for values in (ours, theirs):
        values.requires_grad_()
    losses = functional.cross_entropy(ours, labels, reduction="none")
    found = objective_of(ObjectiveConfig(kind="dft")).adjust(losses)
    log_p = functional.log_softmax(theirs, -1)[labels, labels]
    expected = -log_p.exp().detach() * log_p
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)

    runs = []
    for stages in (1, 2):
        built = build(config_of(model, stages, {"kind": "none"}, objective={"kind": "dft"}))
        loss, losses, _ = run_stages(built, make_batch())
        runs.append((loss, losses, gradients_of(built)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][2][name], gradient) for name, gradient in runs[1][2].items())
    trained = runs[0][1].double()
    mean = (trained * (-trained).exp()).sum() / (trained > 0).sum()
    assert runs[0][0] == pytest.approx(mean.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "simpo"}, "needs a gamma, for example gamma = 0.5"),
        ({"kind": "cpo", "loss": "apo_zero"}, r'choose one of "sigmoid", "hinge", "ipo"'),
        ({"kind": "simpo", "gamma": 1.0, "loss": "ipo"}, "loss has no meaning"),
        ({"kind": "dft", "gamma": 1.0}, "gamma has no meaning"),
    ],
)
def test_settings_that_they_do_not_have_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ObjectiveConfig.model_validate(settings)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_record_names_a_class(kind):
    gamma = {} if OBJECTIVES[kind].gamma is None else {"gamma": OBJECTIVES[kind].gamma}
    teacher = {"teacher": "models/a"} if OBJECTIVES[kind].has_teacher else {}
    objective = objective_of(ObjectiveConfig(kind=kind, **gamma, **teacher))
    assert hasattr(objective, "compare") == (OBJECTIVES[kind].columns == "pairs")
