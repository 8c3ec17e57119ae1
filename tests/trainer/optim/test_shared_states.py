"""Optimizer states that ranks share out, or that lie in host memory: the same bits."""

import shutil

import pytest
from runs import checkpoint_tensors, exact_metrics, run_ranks
from torch import equal

from headrace.schemas.errors import ConfigError
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.optimizer_config import OptimizerConfig
from headrace.schemas.train.optimizers import OPTIMIZERS
from headrace.schemas.train.train_config import TrainConfig

pytestmark = pytest.mark.slow


def test_every_optimizer_steps_and_resumes_as_one_that_holds_all_states(tmp_path):
    run_ranks("shard_rank.py", 2, tmp_path / "held")
    kinds, held = (tmp_path / "held").read_text().split()
    assert int(kinds) == sum(record.shardable for record in OPTIMIZERS.values()) >= 7
    assert float(held) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind", ["lora", pytest.param("none", marks=pytest.mark.exhaustive)])
def test_a_run_has_the_bits_and_the_checkpoints_of_one_that_shares_nothing(training, kind):
    layout = {"gradient_accumulation_steps": 2, "adapter__kind": kind, "max_steps": 6}
    layout |= {"checkpoint__every_steps": 3, "checkpoint__keep_last": 9}
    plain = training.run("plain", 2, **layout)
    both = {"optimizer__shard": True, "optimizer__offload": True}
    shared = training.run("shared", 2, **layout, **both)
    assert exact_metrics(shared) == exact_metrics(plain)
    expected = checkpoint_tensors(plain)
    for run in (shared, resumed_without(training, shared, layout)):
        tensors = checkpoint_tensors(run)
        assert tensors.keys() == expected.keys()
        assert all(equal(tensors[name], value) for name, value in expected.items())


def resumed_without(training, run, layout):
    """Return a run that goes on in the middle without sharing."""
    shutil.rmtree(run / "checkpoints" / "step-000006")
    return training.run(run.name, 2, "--resume", **layout)


def test_states_of_whole_weights_are_not_shared_out(training):
    for kind in ("adafactor", "adamw_8bit", "muon"):
        with pytest.raises(ValueError, match=r"cannot be shared out; choose one of adamw, adamw_k"):
            OptimizerConfig(type=kind, lr=1.0, shard=True)
    with pytest.raises(ValueError, match=r"its library's own; set type = .adamw_paged"):
        OptimizerConfig(type="adamw_8bit", lr=1.0, offload=True)
    settings = ["optimizer.shard=true", "relora.every_steps=20", "output_dir='run'"]
    with pytest.raises(ConfigError, match=r"which optimizer.shard shares out"):
        load_config(TrainConfig, training.config, settings)
