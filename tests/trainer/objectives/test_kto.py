"""KTO on single answers: TRL's losses and gradients, the same in every layout, resumed exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from alike_runs import assert_alike
from pair_cases import KINDS, KTO_LOSSES, RANK, make_answers, move, probe, save_model
from pydantic import ValidationError
from runs import checkpoint_tensors, exact_metrics, make_answer_shards, read_metrics
from tiny_families import build, config_of, gradients_of, run_micro_batch, save_tiny

from headrace.schemas.errors import DataError
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.answer_batch import make_answer_batch
from headrace.trainer.metrics.metrics import LabelMetrics, label_metrics, mean_loss
from headrace.trainer.objectives.row_loss import AnswerLoss, RowLoss
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.order.simulation import simulate
from headrace.trainer.preflight import check
from headrace.trainer.shards.decoded_rows import Row
from headrace.trainer.stage.micro_batch import MicroBatch

FIXTURE = Path(__file__).parents[2] / "support" / "pair_losses.json"
LENGTH = 24


def as_row(prompt, answer, label, key):
    ids = np.array(prompt + answer, np.int32)
    mask = np.arange(len(ids)) >= len(prompt)
    return Row(ids, mask, np.array([len(ids)], np.int32), "answers", key, desirable=label)


ROWS = [as_row(*answer, key) for key, answer in enumerate(make_answers())]


def batch_of(rows=ROWS, places=4, *, mismatched=True, length=LENGTH):
    filled = [[row] for row in rows] + [[] for _ in range(places - len(rows))]
    arguments = ([filled], length, Position(), OverlongCount())
    return make_answer_batch(*arguments, mismatched=mismatched)


def micro_batch(batch, rows):
    return MicroBatch(
        document_lengths=batch.document_lengths[0],
        row_lengths=batch.row_lengths[0],
        labels=batch.labels[0].long(),
        loss_scale=1 / rows,
        router_scale=1.0,
        seed=0,
        extras=batch.extras[0],
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("kto") / "model")


def step(model, kind, stages, settings, **adapter):
    """A step's output and gradients, away from the reference."""
    adapter = {"kind": kind, **({"rank": RANK, **adapter} if kind == "lora" else {})}
    objective = {"kind": "kto", **settings}
    config = config_of(model, stages, adapter, objective=objective, micro_batch_size=4)
    built = build(config)
    for part in built:
        part.stage.train()
    move(kind, [(item.name, item.parameter) for part in built for item in part.trained])
    batch = batch_of(mismatched=config.objective.has_baseline)
    outputs = run_micro_batch(built, batch.input_ids[0], micro_batch(batch, len(ROWS)))
    return outputs[-1], gradients_of(built)


def test_prompts_come_again_with_the_answer_to_the_one_before():
    batch = batch_of(ROWS[:3])
    answers = make_answers()[:3]
    for number in range(3):
        prompt, _, _ = answers[number]
        _, other, _ = answers[number - 1]
        joined = (prompt + other)[:LENGTH]
        assert batch.input_ids[0, 4 + number, : len(joined)].tolist() == joined
        labels = batch.labels[0, 4 + number]
        assert labels[labels >= 0].tolist() == other[: LENGTH - len(prompt)]
    assert (batch.labels[0, [3, 7]] == -100).all()
    (extras,) = batch.extras
    assert extras.desirable == [True, False, False]
    assert extras.pairs[3] == []
    own = sum(len(row.input_ids) for row in ROWS[:3])
    assert batch.tokens == sum(extras.counted(batch.row_lengths[0])) == own
    assert batch.trained_tokens == sum(len(answer) for _, answer, _ in answers)

    alone = batch_of(ROWS[:3], mismatched=False)
    assert alone.labels.shape[1] == 4
    assert not alone.extras[0].in_halves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", KTO_LOSSES)
def test_losses_baselines_and_gradients_are_those_of_trl(model, name, kind):
    expected = json.loads(FIXTURE.read_text())["kto"][f"{kind}, {name}"]
    output, gradients = step(model, kind, 2, KTO_LOSSES[name][0])
    assert output.value.item() == pytest.approx(expected["loss"], rel=1e-5)
    desirable = torch.tensor([label for _, _, label in make_answers()])
    rewards = output.pairs.reward
    assert rewards[desirable].mean().item() == pytest.approx(expected["chosen_reward"], abs=1e-5)
    assert rewards[~desirable].mean().item() == pytest.approx(expected["rejected_reward"], abs=1e-5)
    assert output.pairs.baseline.mean().item() == pytest.approx(expected["baseline"], abs=1e-5)
    assert gradients.keys() == expected["gradients"].keys()
    for parameter, gradient in gradients.items():
        theirs = expected["gradients"][parameter]
        assert probe(gradient) == pytest.approx(theirs, abs=1e-5 * max(1e-2, theirs[0])), parameter


def test_one_case_has_a_baseline_above_zero():
    found = json.loads(FIXTURE.read_text())["kto"].values()
    assert any(case["baseline"] > 1e-3 for case in found)


@pytest.mark.parametrize("kind", KINDS)
def test_two_stages_give_the_bits_of_one(model, kind):
    (one, gradients), (two, others) = (step(model, kind, stages, {}) for stages in (1, 2))
    assert torch.equal(one.value, two.value)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert any(gradient.any() for gradient in gradients.values())


def test_mismatched_answers_leave_routers_alone(tmp_path):
    directory = save_tiny("mixtral", tmp_path / "model")
    losses = []
    for settings in ({}, {"loss": "apo_zero"}):
        output, _ = step(directory, "lora", 1, settings, target_modules=["q_proj"])
        losses.append(output.router_loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] > 0


def test_filling_without_an_answer_has_no_gradient(model):
    adapter = {"kind": "lora", "rank": RANK}
    built = build(config_of(model, 1, adapter, objective={"kind": "kto"}, micro_batch_size=4))
    batch = batch_of([])
    output = run_micro_batch(built, batch.input_ids[0], micro_batch(batch, 1))[-1]
    assert output.value.item() == 0
    assert all(not gradient.any() for gradient in gradients_of(built).values())


def test_metrics_are_means_over_answers():
    losses = [AnswerLoss(0.25, 2.0, 0.5, True), AnswerLoss(0.5, 1.0, 0.5, False)]
    rows = [RowLoss("a", 3.0, 4, answer=answer) for answer in losses]
    assert label_metrics(rows) == LabelMetrics(2, 1, 0.5, 2.0, 1.0, 1.0)
    assert label_metrics(rows[:1]) == LabelMetrics(1, 1, 0.5, 2.0, None, None)
    assert mean_loss(rows) == 0.375
    assert label_metrics([RowLoss("a", 1.0, 1)]) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batch_size": 1}, "compares with answers to the other prompts of a micro-batch"),
        ({"micro_batch_size": 2, "loader": {"pack": "best_fit"}}, 'set "none"'),
        ({"objective": {"kind": "kto", "loss": "hinge"}}, 'choose one of "sigmoid", "apo_zero"'),
        ({"objective": {"kind": "dpo", "desirable_weight": 2.0}}, "has no meaning"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings, message):
    values = {"objective": {"kind": "kto"}} | settings
    with pytest.raises(ValidationError, match=message):
        config_of("unused", **values)


# --- whole runs ---


@pytest.fixture
def answer_training(training, tiny_model, tiny_shards, tmp_path):
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        good = bool(generator.integers(2))
        words = ["mill", "river", "stone"] if good else ["no", "maybe", "never"]
        text = " ".join(generator.choice(words, generator.integers(2, 9)))
        rows.append({"prompt": "water wheel? ", "completion": f"{text}.", "label": good})
    shards = make_answer_shards(tiny_model, tmp_path, rows, shards=2)
    text = training.config.read_text().replace(str(tiny_shards), str(shards))
    training.config.write_text(text)
    return training


SETTINGS = {
    "objective__kind": "kto",
    "objective__beta": 0.5,
    "optimizer__lr": 1e-2,
    "scheduler__warmup_steps": 0,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "checkpoint__every_steps": 3,
}


@pytest.mark.exhaustive
def test_labels_are_judged_over_whole_answers_that_ranks_share(answer_training):
    settings = {**SETTINGS, "adapter__dropout": 0.0}
    one = answer_training.run("one", 1, **settings)
    cut = answer_training.run("cut", 4, pipeline_stages=2, sequence_parallel=2, **settings)
    assert_alike(cut, one)


@pytest.mark.slow
def test_a_run_learns_labels_and_resumes_over_two_stages_with_the_same_bits(answer_training):
    one = answer_training.run("one", 1, **SETTINGS)
    first, *_, last = (line for line in read_metrics(one) if line["kind"] == "evaluation")
    assert first["labels"]["margin"] == first["labels"]["baseline"] == 0
    assert last["labels"]["margin"] > 0.3
    assert last["loss"] < first["loss"] == pytest.approx(0.5)

    sets = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in SETTINGS.items()]
    config = load_config(TrainConfig, answer_training.config, sets)
    steps = [line for line in read_metrics(one) if line["kind"] == "train"]
    for line, plan in zip(steps, simulate(config, check(config, 1)), strict=True):
        names = ("rows_sha256", "tokens", "fill", "source_tokens", "epoch")
        assert [line[name] for name in names] == [getattr(plan, name) for name in names]

    newest = one / "checkpoints" / "step-000006"
    lines, expected = exact_metrics(one), checkpoint_tensors(one)
    newest.rename(one / "kept")
    answer_training.run("one", 2, "--resume", **SETTINGS, pipeline_stages=2)
    assert exact_metrics(one) == lines
    resumed = checkpoint_tensors(one)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_rows_of_another_kind_are_refused_before_anything_starts(training, answer_training):
    config = load_config(TrainConfig, answer_training.config)
    with pytest.raises(DataError, match=r'would learn both; set kind = "kto"'):
        check(config, 1)


def test_shards_without_labels_are_refused(training):
    sets = ['objective.kind="kto"', "micro_batch_size=2"]
    with pytest.raises(DataError, match="holds no answers with labels"):
        check(load_config(TrainConfig, training.config, sets), 1)
