"""Distillation: TRL's divergences of transformers' own logits, with a teacher of another width."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from runs import checkpoint_tensors, exact_metrics, read_metrics
from tiny_families import (
    build,
    config_of,
    gradients_of,
    make_batch,
    run_stages,
    save_tiny,
)
from torch.nn import functional
from transformers import AutoModelForCausalLM

from headrace.schemas.errors import ConfigError
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.preflight import check

SETTINGS = [
    {"divergence": 0.0},
    {"divergence": 1.0, "temperature": 2.0},
    {"divergence": 0.3, "temperature": 0.7, "teacher_weight": 0.6},
]
WIDER = {"hidden_size": 48, "num_hidden_layers": 3}


def named(settings):
    return "-".join(map(str, settings.values()))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student, and a teacher of another family, width and number of layers."""
    folder = tmp_path_factory.mktemp("distill")
    student = save_tiny("llama", folder / "student", tie_word_embeddings=False)
    return student, save_tiny("qwen3", folder / "teacher", **WIDER)


def step(models, stages, settings, adapter=None):
    """Loss, losses of tokens and gradients of a step."""
    student, teacher = models
    objective = {"kind": "distill", "teacher": str(teacher), **settings}
    built = build(config_of(student, stages, adapter, objective=objective))
    for part in built:
        part.stage.train()
    loss, losses, _ = run_stages(built, make_batch())
    return loss, losses, gradients_of(built)


def by_trl(teacher, student, beta):
    """The generalized Jensen-Shannon divergence, from probabilities in float64."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    if beta == 0:
        return (p * (p / q).log()).sum(-1)
    if beta == 1:
        return (q * (q / p).log()).sum(-1)
    mixed = beta * p + (1 - beta) * q
    return (beta * p * (p / mixed).log() + (1 - beta) * q * (q / mixed).log()).sum(-1)


def expected(models, settings):
    """Loss and gradients by transformers, each document alone, in float64."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(path).double() for path in models)
    temperature, weight = settings.get("temperature", 1.0), settings.get("teacher_weight", 1.0)
    batch, total = make_batch(), 0.0
    for ids in batch.documents():
        with torch.no_grad():
            theirs = teacher(ids).logits[0, :-1]
        logits = student(ids).logits[0, :-1]
        found = by_trl(theirs / temperature, logits / temperature, settings["divergence"])
        plain = functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        total = total + weight * found.sum() + (1 - weight) * plain
    loss = total / batch.trained_tokens
    loss.backward()
    return loss.item(), {name: value.grad for name, value in student.named_parameters()}


@pytest.mark.parametrize("settings", SETTINGS, ids=named)
def test_losses_and_gradients_are_those_of_trl_on_transformers_logits(models, settings):
    loss, _, gradients = step(models, 2, settings)
    reference, theirs = expected(models, settings)
    assert loss == pytest.approx(reference, rel=1e-5)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        difference = (gradient.double() - theirs[name]).norm()
        assert difference <= 1e-5 * max(1e-2, theirs[name].norm()), name


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "rank": 4, "dropout": 0.1}])
def test_two_stages_give_the_bits_of_one(models, adapter):
    (one, losses, gradients), (two, others, again) = (
        step(models, stages, SETTINGS[2], adapter) for stages in (1, 2)
    )
    assert one == two
    assert torch.equal(losses, others)
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)
    assert any(gradient.any() for gradient in gradients.values())


def test_a_student_that_is_its_teacher_has_nothing_to_learn(models):
    student, _ = models
    loss, losses, gradients = step((student, student), 1, {"divergence": 0.5})
    assert loss == pytest.approx(0, abs=1e-6)
    assert losses.sum() > 1  # cross-entropy is reported beside it
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": {"kind": "distill"}}, "needs a teacher"),
        ({"objective": {"kind": "dft", "teacher": "a"}}, "teacher has no meaning"),
        ({"sequence_parallel": 2}, "goes through the stages with whole rows"),
        (
            {"schedule": "interleaved", "pipeline_stages": 2, "gradient_accumulation_steps": 2},
            "goes once through each stage",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings, message):
    values = {"objective": {"kind": "distill", "teacher": "a"}} | settings
    with pytest.raises(ValidationError, match=message):
        config_of("unused", **values)


# --- whole runs ---


def teacher_beside(tiny_model, folder, **changes):
    """A teacher with the tokenizer of the tiny model."""
    config = json.loads((tiny_model / "config.json").read_text())
    changes = {"vocab_size": config["vocab_size"], **WIDER, **changes}
    teacher = save_tiny("qwen3", folder / "teacher", **changes)
    shutil.copy(tiny_model / "tokenizer.json", teacher)
    return teacher


def test_a_teacher_of_other_ids_or_too_few_layers_is_refused(training, tiny_model, tmp_path):
    for changes, message in (
        ({"vocab_size": 97}, "has a vocabulary of 97"),
        ({"num_hidden_layers": 1}, "has 1 layers for 2 stages"),
    ):
        folder = tmp_path / next(iter(changes))
        folder.mkdir()
        teacher = teacher_beside(tiny_model, folder, **changes)
        sets = [f'objective={{kind="distill",teacher="{teacher}"}}', "pipeline_stages=2"]
        with pytest.raises(ConfigError, match=message):
            check(load_config(TrainConfig, training.config, sets), 2)


@pytest.mark.slow
def test_a_run_nears_its_teacher_and_resumes_over_two_stages_with_the_same_bits(
    training, tiny_model, tmp_path
):
    settings = {
        "objective__kind": "distill",
        "objective__teacher": str(teacher_beside(tiny_model, tmp_path)),
        "max_steps": 6,
        "checkpoint__every_steps": 3,
    }
    one = training.run("one", 1, **settings)
    first, *_, last = (line for line in read_metrics(one) if line["kind"] == "evaluation")
    assert last["loss"] < first["loss"]
    assert last["cross_entropy"] != last["loss"]

    lines, wanted = exact_metrics(one), checkpoint_tensors(one)
    (one / "checkpoints" / "step-000006").rename(one / "kept")
    training.run("one", 2, "--resume", **settings, pipeline_stages=2)
    assert exact_metrics(one) == lines
    resumed = checkpoint_tensors(one)
    assert all(torch.equal(resumed[name], wanted[name]) for name in wanted)
