"""Plans of runs whose weights several ranks share."""

import pytest
import torch
from tiny_families import config_of, save_tiny

from headrace.trainer.building.model_builder import build_stage
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.planning.proposals import parts_of_weights, propose
from headrace.trainer.planning.run_plan import plan_run
from headrace.trainer.planning.tiny_trials import TinyTrials
from headrace.trainer.tensor_parallel.shard import TensorShard

TOKENS, CPU = 256, torch.device("cpu")
LORA = {"kind": "lora", "rank": 4}


@pytest.mark.parametrize(("family", "adapter"), [("qwen3_moe", LORA), ("llama", {"kind": "none"})])
def test_a_rank_holds_the_weights_that_the_plan_says(family, adapter, tmp_path):
    model = save_tiny(family, tmp_path / "model", vocab_size=96)
    config = config_of(model, adapter=adapter, tensor_parallel=2)
    run = plan_run(config, plan_model(config), 2, TOKENS)
    built = build_stage(config, 0, CPU, plan_model(config), shard=TensorShard(0, 2))
    (stage,) = run.stages
    head = built.tied_head  # over the memory of the embedding
    held = {id(p): p.numel() for p in built.stage.parameters() if p is not head}
    assert stage.weights == sum(held.values())
    assert stage.trained == sum(item.parameter.numel() for item in built.trained)


@pytest.mark.exhaustive
def test_parts_keep_less_of_each_layer_than_the_whole(tmp_path):
    model = save_tiny("llama", tmp_path / "model", vocab_size=96)
    peaks, kept = [], []
    for ranks in (1, 2):
        config = config_of(model, adapter=LORA, tensor_parallel=ranks)
        run = plan_run(config, plan_model(config), ranks, TOKENS)
        kept.append(run.activations.kept_of(0, None))
        peaks.append(run.peak)
    assert kept[0] / 2 < kept[1] < kept[0], "norms and what is added up stay whole"
    assert peaks[0] / 2 < peaks[1] < peaks[0]


def test_proposals_share_weights_among_numbers_of_ranks_that_divide_them(tmp_path):
    model = save_tiny("llama", tmp_path / "model", vocab_size=96)
    config = config_of(model, adapter=LORA, gradient_accumulation_steps=2)
    run = plan_run(config, plan_model(config), 4, TOKENS)
    tried = TinyTrials(run)
    assert parts_of_weights(run, 4, tried) == [2], "there are two key heads"
    found = propose(run, 4, 2 * run.peak, tried)
    assert {proposal.run.config.tensor_parallel for proposal in found} == {1, 2}
    shared = [proposal for proposal in found if proposal.run.config.tensor_parallel == 2]
    assert min(proposal.run.peak for proposal in shared) < run.peak
