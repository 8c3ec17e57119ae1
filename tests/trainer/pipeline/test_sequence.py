"""Rows cut among the ranks of a stage: losses, gradients and rows of one process."""

import pytest
from alike_runs import PACKED, assert_alike, forget_after
from runs import read_metrics, run_ranks
from tiny_families import FAMILIES

pytestmark = pytest.mark.slow

FEW = ("phi3", "qwen3", "gpt_oss", "deepseek_v3")


def test_layers_of_families_give_what_they_give_of_whole_rows(tmp_path):
    """Windows, frequencies by document, sinks, latent attention and routers; keys are repeated."""
    run_ranks("sequence_rank.py", 2, tmp_path, *FEW)


@pytest.mark.exhaustive
def test_all_families_give_what_they_give_of_whole_rows(tmp_path):
    families = [family for family in FAMILIES if family != "falcon"]
    run_ranks("sequence_rank.py", 4, tmp_path, *families, "gpt_oss", "deepseek_v3", limit=900)


@pytest.mark.exhaustive
def test_layers_that_share_rows_compile_whole():
    run_ranks("compiled_rank.py", 2)


def test_stages_of_shared_rows_train_as_one_process_and_resume_as_one(training):
    kept = {"max_steps": 6, "checkpoint__every_steps": 3, "checkpoint__keep_last": 9, **PACKED}
    one = training.run("one", 1, **kept)
    cut = training.run("cut", 4, pipeline_stages=2, sequence_parallel=2, **kept)
    assert_alike(cut, one)
    (newest,) = (cut / "checkpoints").glob("step-000006")
    assert len(list(newest.glob("*.safetensors"))) == 2, "one rank writes the weights of a stage"
    assert (cut / "adapter" / "adapter_config.json").exists()
    forget_after(cut, 3)
    assert_alike(training.run("cut", 1, "--resume", **kept), one)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["lora", "none"], ids=["LoRA", "full"])
def test_every_layout_trains_as_one_process(family_training, kind):
    settings = {**PACKED, "adapter__kind": kind, "max_steps": 4, "checkpoint__keep_last": 9}
    settings |= {"checkpoint__every_steps": 2}
    one = family_training.run("one", 1, **settings)
    for stages in (1, 2):
        for replicas in (1, 2):
            for sequence in (1, 2):
                layout = {"pipeline_stages": stages, "sequence_parallel": sequence}
                layout["gradient_accumulation_steps"] = 4 // replicas
                ranks = stages * replicas * sequence
                name = f"{stages}-{replicas}-{sequence}"
                run = family_training.run(name, ranks, **settings, **layout)
                assert_alike(run, one)
                forget_after(run, 2)
    layout = {"pipeline_stages": 2, "sequence_parallel": 2}
    for name in ("1-1-1", "2-1-1", "1-2-2"):
        resumed = family_training.run(name, 4, "--resume", **settings, **layout)
        assert_alike(resumed, one)


@pytest.mark.exhaustive
def test_chunks_of_stages_share_rows_too(training):
    one = training.run("one", 1, **PACKED)
    layout = {"pipeline_stages": 2, "sequence_parallel": 2, "schedule": "interleaved"}
    assert_alike(training.run("cut", 4, **layout, **PACKED), one)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "settings",
    [
        {"adapter__kind": "control"},
        {"adapter__kind": "dora"},
        {"quantization__backend": "bnb", "weight_offload": "mlp"},
        {"activation_checkpointing": "full", "activation_offload": True},
        {"activation_checkpointing": "selective"},
        {"adapter__kind": "none", "optimizer__shard": True, "optimizer__offload": True},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_what_else_a_stage_may_do_goes_with_shared_rows(training, settings):
    settings = {**settings, "adapter__dropout": 0.0}
    one = training.run("one", 1, **settings)
    assert_alike(training.run("cut", 2, sequence_parallel=2, **settings), one)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["dpo", "simpo"])
def test_pairs_are_compared_over_whole_answers(pair_training, kind):
    settings = {"adapter__dropout": 0.0, "objective__kind": kind}
    settings |= {"objective__gamma": 0.5} if kind == "simpo" else {}
    one = pair_training.run("one", 1, **settings)
    cut = pair_training.run("cut", 4, pipeline_stages=2, sequence_parallel=2, **settings)
    assert_alike(cut, one)


def test_dropout_of_processes_that_share_rows_is_the_same_again(training):
    run = training.run("dropout", 2, sequence_parallel=2, max_steps=2, adapter__dropout=0.5)
    again = training.run("again", 2, sequence_parallel=2, max_steps=2, adapter__dropout=0.5)
    losses = [[line["loss"] for line in read_metrics(one)] for one in (run, again)]
    assert losses[0] == losses[1]
