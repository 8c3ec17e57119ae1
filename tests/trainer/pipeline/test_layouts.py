"""One process is the reference for every layout: same rows, losses and weights, bit by bit."""

import pytest
import torch
from runs import STDLIB, checkpoint_tensors, exact_metrics, make_shards, read_metrics, source

from headrace.schemas.shards.manifest_file import read_manifest

pytestmark = pytest.mark.slow


def many(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("kind", "cuts"), [("lora", (4,)), many("lora", (2, 3)), many("none", (2,))]
)
def test_stages_change_no_bit_and_replicas_only_rounding(training, kind, cuts):
    one = training.run("one", 1, adapter__kind=kind)
    reference, losses = checkpoint_tensors(one), exact_metrics(one)
    assert len(losses) == 12
    assert losses[-1]["loss"] < losses[0]["loss"], "nothing was learned, so nothing is compared"
    assert [line["step"] for line in losses if line["token_summary"]] == [0, 4, 8, 10]

    for stages in cuts:
        settings = {"pipeline_stages": stages, "reporting__every_steps": stages}
        run = training.run(f"stages-{stages}", stages, adapter__kind=kind, **settings)
        assert exact_metrics(run) == losses
        tensors = checkpoint_tensors(run)
        assert tensors.keys() == reference.keys()
        assert all(torch.equal(tensors[name], reference[name]) for name in reference)

    both = training.run(
        "two-by-two", 4, adapter__kind=kind, pipeline_stages=2, gradient_accumulation_steps=2
    )
    rows = [line["rows_sha256"] for line in exact_metrics(both)]
    assert rows == [line["rows_sha256"] for line in losses]
    for line, expected in zip(read_metrics(both), read_metrics(one), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        if expected["token_summary"]:
            entropy = expected["token_summary"]["entropy"]
            assert line["token_summary"]["entropy"] == pytest.approx(entropy, rel=1e-6)
    tensors = checkpoint_tensors(both)
    for name in (name for name in reference if name.startswith("parameter/")):
        difference = torch.linalg.vector_norm(tensors[name] - reference[name])
        assert difference <= 1e-6 * torch.linalg.vector_norm(reference[name]), name


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_it_makes_no_difference_which_ranks_are_neighbors(training, kind):
    square = {"adapter__kind": kind, "pipeline_stages": 2, "gradient_accumulation_steps": 2}
    stages = training.run("stages", 4, **square)
    replicas = training.run("replicas", 4, neighbors="replicas", **square)
    assert exact_metrics(replicas) == exact_metrics(stages)
    tensors = checkpoint_tensors(stages)
    assert all(torch.equal(tensors[k], v) for k, v in checkpoint_tensors(replicas).items())
    result = "adapter" if kind == "lora" else "model"
    for path in (stages / result).glob("*.safetensors*"):
        assert (replicas / result / path.name).read_bytes() == path.read_bytes()


def test_larger_micro_batches_without_read_ahead_see_the_same_rows(training):
    plain = {"adapter__dropout": 0.0}
    one = training.run("one", 1, **plain)
    changes = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "pipeline_stages": 2}
    other = training.run("other", 2, loader__prefetch_batches=0, **changes, **plain)
    for line, expected in zip(read_metrics(other), read_metrics(one), strict=True):
        assert line.get("rows_sha256") == expected.get("rows_sha256")
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_all_weights_checkpointed_in_two_stages_are_trained_bit_by_bit_as_in_one_process(training):
    kept = training.run("kept", 1, adapter__kind="none", max_steps=4)
    cut = {"pipeline_stages": 2, "activation_checkpointing": "full"}
    both = training.run("both", 2, adapter__kind="none", max_steps=4, **cut)
    assert exact_metrics(both) == exact_metrics(kept)
    ours, expected = checkpoint_tensors(both), checkpoint_tensors(kept)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.exhaustive
def test_activation_checkpointing_changes_no_bit(training):
    kept = training.run("kept", 2, pipeline_stages=2)
    recomputed = training.run("recomputed", 2, pipeline_stages=2, activation_checkpointing="full")
    assert exact_metrics(recomputed) == exact_metrics(kept)


def test_whole_epochs_train_every_token_once_an_epoch_whatever_is_left_for_the_last_batch(
    training, tiny_model, tiny_shards, tmp_path
):
    """One replica and two, whose last batch is smaller and leaves one of them without a row."""
    text = source("this", STDLIB / "this.py")
    shards = make_shards(tiny_model, tmp_path / "shards", sources=[text])
    manifest = read_manifest(shards)
    rows = sum(shard.rows for shard in manifest.split("train"))
    assert 3 * rows % 8 in (3, 5, 7), "choose another text: one replica must lack a row at the end"
    config = training.config.read_text().replace("max_steps = 10", "epochs = 3")
    training.config.write_text(config.replace(str(tiny_shards), str(shards), 1))

    one = training.run("one", 1, gradient_accumulation_steps=8)
    two = training.run("two", 2)
    tokens = [line.get("tokens", 0) for line in read_metrics(one)]
    assert sum(tokens) == 3 * manifest.ledger.tokens_out["train"]
    for line, expected in zip(read_metrics(two), read_metrics(one), strict=True):
        assert line.get("rows_sha256") == expected.get("rows_sha256")
        assert line.get("tokens") == expected.get("tokens")
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
