"""Objectives of answers to prompts with pictures: TRL's formulas over transformers' documents."""

import numpy as np
import pytest
import torch
from pair_cases import move
from tiny_families import build, config_of, gradients_of, run_micro_batch
from tiny_vision import VOCABULARY, make_rows, reference_losses, save_tiny
from torch.nn.functional import logsigmoid
from transformers import AutoModelForImageTextToText

from headrace.trainer.architecture.read_architecture import read_architecture
from headrace.trainer.batches.answer_batch import make_answer_batch, mismatched_rows
from headrace.trainer.batches.pair_batch import make_pair_batch
from headrace.trainer.batches.vision_batch import make_vision_batch
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.shards.decoded_pairs import Pair
from headrace.trainer.stage.micro_batch import MicroBatch
from headrace.trainer.vision.processor import open_processor

BETA = 0.3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = save_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def with_answer(row, answer, **more):
    """A prompt with pictures, and an answer, which alone is trained."""
    ids = np.concatenate([row.input_ids, np.array(answer, np.int32)])
    mask = np.arange(len(ids)) >= len(row.input_ids)
    lengths = np.array([len(ids)], np.int32)
    return row._replace(input_ids=ids, loss_mask=mask, document_lengths=lengths, **more)


def answers(family):
    """Two answers to each prompt; prompts have 1, 2 and no pictures."""
    chance = np.random.default_rng(5)
    for row in make_rows(family, [[1], [2], [0]]):
        yield row, *(chance.integers(10, VOCABULARY, size).tolist() for size in (4, 6))


def pairs_of(family):
    return [Pair(with_answer(row, a), with_answer(row, b)) for row, a, b in answers(family)]


def answers_of(family):
    return [
        with_answer(row, a if number % 2 else b, desirable=bool(number % 2))
        for number, (row, a, b) in enumerate(answers(family))
    ]


def step(model, rows, lay_out, config):
    """The last stage's output of a step away from the reference, and its gradients."""
    built = build(config)
    for part in built:
        part.stage.train()
    kind = config.adapter.kind
    move(kind, [(item.name, item.parameter) for part in built for item in part.trained])
    architecture = read_architecture(model, vision=True)
    batch = make_vision_batch(
        [[[row] for row in rows]],
        128,
        Position(),
        OverlongCount(),
        processor=open_processor(model, architecture.vision, architecture.whole),
        lay_out=lay_out,
    )
    micro_batch = MicroBatch(
        document_lengths=batch.document_lengths[0],
        row_lengths=batch.row_lengths[0],
        labels=batch.labels[0].long(),
        loss_scale=1 / len(rows),
        router_scale=1.0,
        seed=0,
        extras=batch.extras[0],
        chosen_scale=1 / max(batch.chosen_tokens, 1),
    )
    return run_micro_batch(built, batch.input_ids[0], micro_batch)[-1], gradients_of(built)


def log_probabilities(model, family, rows, theirs):
    """Of each answer, by transformers on its document alone."""
    return torch.stack([-reference_losses(model, theirs, family, [row])[0] for row in rows])


def by_trl(kind, ratio_of, rows):
    """The loss of a step, by TRL's formulas.

    Args:
        ratio_of: log-probabilities of rows, over those of the reference where there is one.
    """
    if kind == "kto":
        own, others = (
            ratio_of(rows),
            ratio_of([row for [row] in mismatched_rows([[r] for r in rows])]),
        )
        baseline = (BETA * others).detach().mean().clamp(min=0)
        signs = torch.tensor([1.0 if row.desirable else -1.0 for row in rows])
        return (1 - torch.sigmoid(signs * (BETA * own - baseline))).mean()
    sides = [[pair[side] for pair in rows] for side in range(2)]
    chosen, rejected = (ratio_of(side) for side in sides)
    if kind == "dpo":
        return -logsigmoid(BETA * (chosen - rejected)).mean()
    tokens = [torch.tensor([row.loss_mask.sum() for row in side]) for side in sides]
    return -logsigmoid(BETA * (chosen / tokens[0] - rejected / tokens[1]) - 0.5).mean()


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("dpo", "qwen2_vl"),
        ("kto", "qwen2_vl"),
        ("simpo", "llava"),
        *(
            pytest.param(kind, family, marks=pytest.mark.exhaustive)
            for kind, family in [("dpo", "mistral3"), ("dpo", "llava_next"), ("kto", "qwen3_vl")]
        ),
    ],
)
def test_a_step_on_answers_about_pictures_is_that_of_trl(models, kind, family):
    model = models(family)
    rows = answers_of(family) if kind == "kto" else pairs_of(family)
    objective = {"kind": kind, "beta": BETA, **({"gamma": 0.5} if kind == "simpo" else {})}
    whole = {"train": True, "projector": True}
    config = config_of(model, 2, objective=objective, vision=whole, micro_batch_size=len(rows))
    lay_out = make_pair_batch
    if kind == "kto":
        lay_out = lambda *given: make_answer_batch(*given, mismatched=True)  # noqa: E731
    output, gradients = step(model, rows, lay_out, config)

    before, after = (AutoModelForImageTextToText.from_pretrained(model) for _ in range(2))
    move("none", [pair for pair in after.named_parameters() if pair[0] in gradients])

    def ratio_of(some):
        own = log_probabilities(model, family, some, after)
        if kind == "simpo":
            return own
        with torch.no_grad():
            reference = log_probabilities(model, family, some, before)
        return own - reference

    expected = by_trl(kind, ratio_of, rows)
    assert output.value.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    named = dict(after.named_parameters())
    norm = torch.stack([p.grad.norm() for p in named.values() if p.grad is not None]).norm()
    for name, gradient in gradients.items():
        if named[name].grad is not None:
            assert (gradient - named[name].grad).norm() / norm < 1e-5, name


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next"])
def test_adapters_on_the_tower_leave_the_reference_as_it_was(models, family):
    model, rows = models(family), pairs_of(family)
    adapter = {"rank": 2, "vision": True}
    objective = {"kind": "dpo", "beta": BETA}
    config = config_of(
        model, 1, adapter, objective=objective, vision={"projector": True}, micro_batch_size=3
    )
    output, _ = step(model, rows, make_pair_batch, config)
    before = AutoModelForImageTextToText.from_pretrained(model)
    with torch.no_grad():
        reference = log_probabilities(model, family, [pair.chosen for pair in rows], before)
    own = -output.token_losses[: len(rows)].sum(1)
    assert (own - reference).abs().max() > 1e-3
    torch.testing.assert_close(
        output.pairs.chosen_reward, BETA * (own - reference), atol=1e-4, rtol=1e-4
    )
