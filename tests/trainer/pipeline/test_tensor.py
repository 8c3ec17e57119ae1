"""Weights cut among the ranks of a stage: losses, gradients and rows of one process."""

from itertools import product

import pytest
import torch
from alike_runs import PACKED, assert_alike, forget_after
from runs import checkpoint_tensors, read_metrics, run_ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

KEPT = {"max_steps": 6, "checkpoint__every_steps": 3, "checkpoint__keep_last": 9}


def assert_same_result(run, one):
    """The adapters or models that two runs have written agree."""
    for folder in ("adapter", "model"):
        for path in (one / folder).glob("*.safetensors"):
            found, expected = result_of(run / folder), result_of(one / folder)
            assert found.keys() == expected.keys(), path
            for name, value in expected.items():
                assert torch.linalg.vector_norm(found[name] - value) <= 1e-4 * value.norm(), name


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


def result_of(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def test_parts_of_weights_train_as_one_process_and_resume_as_one(training):
    """With dropout, whose choices are those of whole weights."""
    one = training.run("one", 1, **KEPT)
    cut = training.run("cut", 2, tensor_parallel=2, **KEPT)
    assert_alike(cut, one)
    (newest,) = (cut / "checkpoints").glob("step-000006")
    assert len(list(newest.glob("*.safetensors"))) == 1, "one rank writes the weights of a stage"
    whole, found = checkpoint_tensors(one), checkpoint_tensors(cut)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in whole.items()
    }
    forget_after(cut, 3)
    assert_alike(training.run("cut", 1, "--resume", **KEPT), one)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["lora", "none"], ids=["LoRA", "full"])
def test_every_layout_trains_as_one_process(family_training, kind):
    settings = {**PACKED, "adapter__kind": kind, "max_steps": 4, "checkpoint__keep_last": 9}
    settings |= {"checkpoint__every_steps": 2}
    one = family_training.run("one", 1, **settings)
    for stages, replicas, sequence in product((1, 2), repeat=3):
        layout = {"pipeline_stages": stages, "sequence_parallel": sequence, "tensor_parallel": 2}
        layout["gradient_accumulation_steps"] = 4 // replicas
        ranks = stages * replicas * sequence * 2
        run = family_training.run(f"{stages}-{replicas}-{sequence}", ranks, **settings, **layout)
        assert_alike(run, one)
        assert_same_result(run, one)
        forget_after(run, 2)
    forget_after(one, 2)
    layout = {"pipeline_stages": 2, "tensor_parallel": 2}
    for name in ("one", "1-1-2", "2-2-1"):
        assert_alike(family_training.run(name, 4, "--resume", **settings, **layout), one)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["lora", "none"], ids=["LoRA", "full"])
@pytest.mark.parametrize(("sequence", "tensor"), [(1, 2), (2, 1), (2, 2)])
def test_slices_go_with_every_other_dimension(family_training, kind, sequence, tensor):
    """With the layouts above, and those of test_sequence and test_slices, the whole matrix."""
    settings = {**PACKED, "adapter__kind": kind, "max_steps": 4, "checkpoint__keep_last": 9}
    settings |= {"checkpoint__every_steps": 2}
    one = family_training.run("one", 1, **settings)
    shared = {"sequence_slices": 3, "sequence_parallel": sequence, "tensor_parallel": tensor}
    for stages, replicas in product((1, 2), repeat=2):
        layout = {"pipeline_stages": stages, "gradient_accumulation_steps": 4 // replicas}
        name, ranks = f"{stages}-{replicas}", stages * replicas * sequence * tensor
        run = family_training.run(name, ranks, **settings, **layout, **shared)
        assert_alike(run, one)
        assert_same_result(run, one)
        forget_after(run, 2)
    forget_after(one, 2)
    assert_alike(family_training.run("2-2", 1, "--resume", **settings), one)
    resumed = family_training.run("one", sequence * tensor, "--resume", **settings, **shared)
    assert_alike(resumed, family_training.run("again", 1, **settings))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": "full", "activation_offload": True},
        {"activation_checkpointing": "selective"},
        {"adapter__kind": "none", "optimizer__shard": True, "optimizer__offload": True},
        {"adapter__kind": "dora"},
        {"adapter__modules_to_save": ["embed_tokens", "lm_head"]},
        {"adapter__target_modules": ["embed_tokens", "q_proj", "o_proj", "lm_head"]},
        {"adapter__init": "gaussian", "regularization__neftune_alpha": 5.0},
        {"pipeline_stages": 2, "schedule": "interleaved"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_what_else_a_stage_may_do_goes_with_parts_of_weights(training, settings):
    settings = {**settings, "max_steps": 4}
    ranks = settings.get("pipeline_stages", 1)
    one = training.run("one", ranks, **settings)
    cut = training.run("cut", 2 * ranks, tensor_parallel=2, **settings)
    assert_alike(cut, one)
    assert_same_result(cut, one)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "settings",
    [
        {"quantization__backend": "bnb", "weight_offload": "mlp"},
        {"quantization__backend": "bnb", "adapter__kind": "dora"},
        {"quantization__backend": "bnb", "quantization__double_quantization": True},
        {"quantization__backend": "hqq", "quantization__axis": 1},
        {"quantization__backend": "bnb", "quantization__type": "int8"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_quantized_weights_in_parts_train_as_whole_ones(wide_training, settings):
    settings = {**settings, "max_steps": 4}
    one = wide_training.run("one", 1, **settings)
    cut = wide_training.run("cut", 2, tensor_parallel=2, **settings)
    assert_alike(cut, one)


@pytest.mark.exhaustive
def test_8_bit_floats_in_parts_train_as_whole_ones_to_their_rounding(wide_training):
    settings = {"quantization__backend": "fp8", "max_steps": 4}
    exact = losses(wide_training.run("exact", 1, max_steps=4))
    one = losses(wide_training.run("one", 1, **settings))
    cut = losses(wide_training.run("cut", 2, tensor_parallel=2, **settings))
    assert cut == pytest.approx(one, rel=1e-2)
    whole, parts = (
        sum(abs(loss - other) for loss, other in zip(run, exact, strict=True)) for run in (one, cut)
    )
    assert parts < 1.5 * whole


@pytest.mark.exhaustive
def test_pairs_are_compared_over_parts_of_the_vocabulary(pair_training):
    settings = {"objective__kind": "simpo", "objective__gamma": 0.5}
    one = pair_training.run("one", 1, **settings)
    cut = pair_training.run("cut", 2, tensor_parallel=2, **settings)
    assert_alike(cut, one)


@pytest.mark.exhaustive
def test_layers_in_parts_compile_whole(tmp_path):
    run_ranks("compiled_parts_rank.py", 2, tmp_path)
