"""What training writes loads elsewhere and gives the same loss."""

import sys

import pytest
import torch
from runs import complete, read_metrics
from safetensors.torch import load_file

from headrace.schemas.manifest import read_manifest
from headrace.trainer.data.batch import make_batch
from headrace.trainer.data.decoded_rows import DecodedRows
from headrace.trainer.data.position import Position
from headrace.trainer.data.row_groups import list_row_groups
from headrace.trainer.data.row_order import RowOrder
from headrace.trainer.data.row_packer import OverlongCount
from headrace.trainer.data.shard_reader import ShardReader
from headrace.trainer.export.convert import convert
from headrace.trainer.model.device import document_mask, position_ids

pytestmark = pytest.mark.slow

ROWS = 9  # as max_rows in the config


def evaluation_loss(model, shards):
    """Transformers' own forward over the evaluation rows, documents masked from each other."""
    manifest = read_manifest(shards)
    order = RowOrder(list_row_groups([manifest], "evaluation"), 0, window=1, shuffle=False)
    reader = ShardReader(DecodedRows, [shards], [manifest], "evaluation", held_row_groups=1)
    total, count = 0.0, 0
    for index in range(ROWS):
        rows = [[[reader.row(order[index])]]]
        batch = make_batch(rows, manifest.sequence_len, Position(), OverlongCount())
        lengths = batch.document_lengths[0]
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids[0],
                attention_mask=document_mask(lengths, torch.device("cpu")),
                position_ids=position_ids(lengths),
                use_cache=False,
            ).logits
        labels = batch.labels[0]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten().long(), ignore_index=-100, reduction="sum"
        ).item()
        count += batch.trained_tokens
    return total / count


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
