"""What training writes loads elsewhere and gives the same loss."""

import sys

import pytest
import torch
from evaluation_losses import evaluation_loss
from runs import complete, read_metrics
from safetensors.torch import load_file

from headrace.trainer.export.convert import convert

pytestmark = pytest.mark.slow


def headrace(*arguments):
    command = [sys.executable, "-m", "headrace.jobs.cli", *map(str, arguments)]
    done = complete(command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_adapter_loads_in_peft_and_merged_with_the_trainers_loss(
    training, tiny_model, tiny_shards, tmp_path
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = {"pipeline_stages": 2, "optimizer__lr": 2e-2, "adapter__alpha": 16.0}
    run = training.run("run", 2, **settings)
    losses = [line["loss"] for line in read_metrics(run) if line["kind"] == "evaluation"]
    assert losses[-1] < losses[0] - 0.01, "the adapter does too little to be told from none"

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert evaluation_loss(base, tiny_shards) == pytest.approx(losses[0], abs=1e-4)
    adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
    assert evaluation_loss(adapted, tiny_shards) == pytest.approx(losses[-1], abs=1e-3)

    # qlora-pipe's bug 3.1.11: its converter took every layer for the one before
    convert(run, tmp_path / "converted")
    assert_same_files(tmp_path / "converted", run / "adapter")
    card = (run / "adapter" / "README.md").read_text()
    assert f"| train | {read_metrics(run)[1]['loss']:.4f} | " in card
    assert f"| evaluation on tiny | {losses[0]:.4f} | {losses[-1]:.4f} |" in card
    assert "<polyline" in (run / "adapter" / "loss.svg").read_text()

    merged = tmp_path / "merged"
    said = headrace(
        "merge", "--model", tiny_model, "--adapter", run / "adapter", "--output", merged
    )
    assert said == f"{merged}: written, 35 weights changed\n"
    assert (merged / "README.md").read_text() == card
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert evaluation_loss(model, tiny_shards) == pytest.approx(losses[-1], abs=1e-3)
    text = headrace("sample", merged, "def ", "--max-new-tokens", "5")
    assert text.strip()


def load(directory):
    """The tensors of a model, however many files they are in."""
    return {k: t for f in directory.glob("*.safetensors") for k, t in load_file(f).items()}


def assert_same_files(found, expected):
    """The same names, and the same bytes in each file."""
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def test_a_fully_trained_model_loads_in_transformers_with_the_trainers_loss(
    training, tiny_shards, tmp_path
):
    from transformers import AutoModelForCausalLM

    run = training.run("run", 2, adapter__kind="none", pipeline_stages=2)
    convert(run, tmp_path / "converted")
    assert load(tmp_path / "converted").keys() == load(run / "model").keys()
    for name, tensor in load(run / "model").items():
        assert torch.equal(load(tmp_path / "converted")[name], tensor), name
    losses = [line["loss"] for line in read_metrics(run) if line["kind"] == "evaluation"]
    assert losses[-1] < losses[0] - 0.01
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    assert evaluation_loss(model, tiny_shards) == pytest.approx(losses[-1], abs=1e-3)
