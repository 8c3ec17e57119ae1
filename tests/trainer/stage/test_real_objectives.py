"""On the real model, over two stages: pairs are told apart, and control adapters learn."""

import ast
import io

import pytest
from rich.console import Console
from runs import STDLIB, make_pair_shards, make_shards, read_metrics, source

from headrace.jobs.commands.control_report import control_report

pytestmark = pytest.mark.exhaustive

CONFIG = """
model = "{model}"
output_dir = "unused"
max_steps = {steps}
gradient_accumulation_steps = 4
pipeline_stages = 2
threads = 1
datasets = [{{ path = "{shards}" }}]
evaluation_datasets = [{{ path = "{shards}", max_rows = 24 }}]
optimizer = {{ lr = {lr} }}
"""
OBJECTIVES = {
    "dpo, lora": {"objective__kind": "dpo", "objective__beta": 0.2},
    "dpo, full": {
        "objective__kind": "dpo",
        "adapter__kind": "none",
        "optimizer__lr": 2e-5,
        "max_steps": 6,
    },
    "orpo, lora": {"objective__kind": "orpo", "objective__beta": 0.5, "max_steps": 6},
}


def first_lines():
    """Functions of the standard library with the first line of their docstrings."""
    for path in sorted(STDLIB.glob("[a-s]*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                arguments = ", ".join(argument.arg for argument in node.args.args)
                yield f'def {node.name}({arguments}):\n    """', text.splitlines()[0]


@pytest.fixture(scope="module")
def pairs(real_model, tmp_path_factory):
    """A function's own docstring against that of another function."""
    folder = tmp_path_factory.mktemp("real-pairs")
    functions = list(first_lines())[:400]
    rows = [
        {"prompt": head, "chosen": own, "rejected": functions[index - 7][1]}
        for index, (head, own) in enumerate(functions)
        if own != functions[index - 7][1]
    ]
    return make_pair_shards(real_model, folder, "docstrings", rows, max_reject_fraction=1.0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_chosen_answers_come_to_be_preferred_on_held_out_pairs(training, real_model, pairs, name):
    training.config.write_text(CONFIG.format(model=real_model, shards=pairs, steps=12, lr=2e-4))
    run = training.run("run", 2, **OBJECTIVES[name])
    first, last = (line for line in read_metrics(run) if line["kind"] == "evaluation")
    assert last["loss"] < first["loss"]
    assert last["pairs"]["margin"] > first["pairs"]["margin"]
    assert last["pairs"]["accuracy"] > 0.5


def test_the_models_own_answers_come_to_be_the_worse_ones(training, real_model, pairs):
    training.config.write_text(CONFIG.format(model=real_model, shards=pairs, steps=12, lr=2e-4))
    sampling = {"rejected_sampling__max_answer_ratio": 1.5, "max_steps": 6}
    run = training.run("run", 2, **OBJECTIVES["dpo, lora"], **sampling)
    steps = [line for line in read_metrics(run) if line["kind"] == "train"]
    first, last = (line for line in read_metrics(run) if line["kind"] == "evaluation")
    assert steps[0]["pairs"]["margin"] == 0
    for line in steps[-2:]:
        assert line["pairs"]["margin"] > 0.1
        assert line["pairs"]["accuracy"] > 0.5
    assert last["pairs"]["chosen_reward"] > 0  # held-out answers of the kind that was chosen
    assert last["cross_entropy"] < first["cross_entropy"]
    assert all(3 < line["answers"]["tokens"] < 60 for line in steps)


def test_control_adapters_fit_both_classes_and_stay_invertible(training, real_model, tmp_path):
    texts = [
        {**source("json", STDLIB / "json" / "*.py"), "control_class": 1},
        {**source("mail", STDLIB / "email" / "*.py"), "control_class": -1},
    ]
    shards = make_shards(real_model, tmp_path / "shards", sequence_len=64, sources=texts)
    training.config.write_text(CONFIG.format(model=real_model, shards=shards, steps=12, lr=5e-3))
    run = training.run("run", 2, adapter__kind="control", adapter__control_decay=1.0)
    first, last = (line for line in read_metrics(run) if line["kind"] == "evaluation")
    layers = control_report(run / "adapter", Console(file=io.StringIO()), None)
    assert last["loss"] < first["loss"] - 0.01
    assert len(layers) == 30
    assert all(layer.inverse_error < 1e-5 < layer.frobenius_norm for layer in layers)
