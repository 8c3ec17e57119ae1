"""Layouts that `headrace plan` proposes."""

from dataclasses import replace

import pytest
from tiny_families import config_of, save_tiny

from headrace.jobs import cli
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.planning.changes import with_changes
from headrace.trainer.planning.layout_rates import tokens_per_second
from headrace.trainer.planning.proposals import (
    can_tile,
    proposals,
    propose,
    shares_of_rows,
    slices_of_rows,
    ways_to_save,
)
from headrace.trainer.planning.run_plan import plan_run
from headrace.trainer.planning.tiny_trials import TinyTrials

GPUS, TOKENS = 8, 4096
LORA = {"kind": "lora", "rank": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("plan") / "llama", num_hidden_layers=8)


@pytest.fixture(scope="module")
def run(model):
    config = config_of(model, 1, LORA, gradient_accumulation_steps=4)
    return plan_run(config, plan_model(config), GPUS, TOKENS)


@pytest.fixture(scope="module")
def tried(run):
    return TinyTrials(run)


@pytest.fixture(scope="module")
def found(run, tried):
    return propose(run, GPUS, 4 * run.peak, tried)


class Whole:
    """A model of which nothing can be divided."""

    divides_weights = divides_rows = slices_rows = tiles_mlps = False


def test_all_that_fit_come_best_first_and_keep_the_rows_of_a_step(run, found):
    assert len(found) > 20
    rates = [proposal.rate for proposal in found]
    assert rates == sorted(rates, reverse=True)
    for proposal in found:
        config = proposal.run.config
        assert proposal.run.peak < 4 * run.peak
        assert config.gradient_accumulation_steps * proposal.run.replicas == 4 * GPUS
        assert proposal.run.replicas * config.replica_ranks == GPUS
        assert with_changes(run.config, proposal.changes) == config
        TrainConfig.model_validate(config.model_dump(exclude_defaults=True))
    sizes = {(p.run.config.pipeline_stages, p.run.config.sequence_parallel) for p in found}
    assert {(1, 1), (2, 1), (1, 2), (2, 4), (8, 1)} <= sizes


def test_where_memory_is_plenty_nothing_is_computed_again(found):
    best = found[0].run.config
    assert (best.pipeline_stages, best.sequence_parallel) == (1, 1)
    assert best.activation_checkpointing == "none"
    assert best.weight_offload == "none" and not best.activation_offload


def test_what_does_not_fit_is_left_out(run, found):
    least = min(proposal.run.peak for proposal in found)
    small = [p for p in found if p.run.peak <= 2 * least]
    assert 0 < len(small) < len(found)
    assert small[0].rate < found[0].rate


def test_what_saves_memory_costs_time(run):
    def rate(**changes):
        config = with_changes(run.config, changes)
        return tokens_per_second(plan_run(config, run.plan, GPUS, TOKENS, run.activations))

    assert rate(activation_checkpointing="full") < rate()
    assert rate(pipeline_stages=2) < rate()
    assert rate(sequence_parallel=4) < rate()
    assert rate(**{"optimizer.offload": True}) < rate()
    assert rate(activation_checkpointing="full", weight_offload="mlp") <= rate(
        activation_checkpointing="full"
    )


def test_too_little_memory_is_said(run, tried):
    assert "No layout of 8 GPU(s)" in proposals(run, GPUS, 1.0, tried)


def test_models_whose_rows_cannot_be_cut_keep_them_whole(run, tried):
    assert shares_of_rows(run, GPUS, tried) == [1, 2, 4]
    assert shares_of_rows(run, GPUS, Whole()) == [1]


def test_slices_are_proposed_where_stages_would_wait(run, found):
    sliced = [p for p in found if p.run.config.sequence_slices == 2]
    assert {p.run.config.pipeline_stages for p in sliced} == {2, 4, 8}
    for proposal in sliced:
        config = proposal.run.config.model_copy(update={"sequence_slices": 1})
        whole = plan_run(config, run.plan, GPUS, TOKENS, run.activations)
        assert proposal.rate > GPUS * tokens_per_second(whole)
    assert slices_of_rows(run, Whole()) == [1]


def test_mlps_of_long_rows_are_tried_in_tiles(run, tried):
    assert not can_tile(run, tried)
    assert can_tile(replace(run, sequence_len=1 << 15), tried)
    assert not can_tile(replace(run, sequence_len=1 << 15), Whole())
    tried = [way for way in ways_to_save(run.config, copies=1, tiled=True) if "tiles" in way]
    assert {way["activation_checkpointing"] for way in tried} == {"attention", "full"}


def test_the_command_names_the_keys_of_the_best(model, tmp_path, capsys):
    config = tmp_path / "train.toml"
    config.write_text(
        f'model = "{model}"\noutput_dir = "run"\npipeline_stages = 2\n'
        'gradient_accumulation_steps = 8\n[[datasets]]\npath = "none"\n[optimizer]\nlr = 1e-3\n'
        '[adapter]\nkind = "lora"\n'
    )
    command = ["plan", str(config), "--gpus", "4", "--memory", "1GiB", "--sequence-len", "1024"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(command)
    text = capsys.readouterr().out
    assert "Layouts of 4 GPU(s) that fit, by expected rate" in text
    assert "  pipeline_stages = 1\n" in text
