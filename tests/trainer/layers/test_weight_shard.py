"""Frozen weights that replicas share out: the bits of whole ones, and a part of the memory."""

import pytest
from runs import checkpoint_tensors, exact_metrics, run_ranks
from tiny_families import config_of
from torch import equal

from headrace.schemas.errors import ConfigError
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.preflight import check

LORA = {"kind": "lora", "rank": 2}


@pytest.mark.slow
@pytest.mark.parametrize("cases", ["few", pytest.param("all", marks=pytest.mark.exhaustive)])
def test_shared_weights_give_the_bits_of_whole_ones_in_every_format(tmp_path, cases):
    run_ranks("weight_shard_rank.py", 2, tmp_path, cases)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {"gradient_accumulation_steps": 2}),
        pytest.param(
            4,
            {"pipeline_stages": 2, "sequence_parallel": 2, "schedule": "interleaved"},
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            4,
            {"pipeline_stages": 2, "gradient_accumulation_steps": 2, "sequence_slices": 2},
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            4,
            {"tensor_parallel": 2, "gradient_accumulation_steps": 2, "optimizer__shard": True},
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["replicas", "chunks, shared rows", "stages, slices", "parts of weights"],
)
def test_a_run_is_the_same_with_its_weights_shared_out(training, ranks, layout):
    settings = {**layout, "max_steps": 3, "adapter__dropout": 0.0}
    plain = training.run("plain", ranks, **settings)
    shared = training.run("shared", ranks, **settings, weight_shard="layers")
    assert exact_metrics(shared) == exact_metrics(plain)
    ours, expected = checkpoint_tensors(shared), checkpoint_tensors(plain)
    assert all(equal(ours[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": {"kind": "none"}}, 'weight_shard = "layers" holds frozen weights under'),
        ({"weight_offload": "mlp"}, 'does not go with weight_offload = "mlp"; drop one'),
        ({"evaluation": {"prompts": ["a"]}}, "does not go with evaluation.prompts; drop one"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of("unused", 1, **{"adapter": LORA, "weight_shard": "layers", **settings})


def test_weights_at_one_process_alone_are_not_shared_out(training):
    config = load_config(
        TrainConfig,
        training.config,
        ['output_dir="run"', 'weight_shard="mlp"', "pipeline_stages=2"],
    )
    with pytest.raises(ConfigError, match="and of 2 none does; start more, for replicas"):
        check(config, 2)
