"""Models whose weights are cut: which of them give the same, and which are refused by name."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pydantic import ValidationError
from tiny_families import DISCOVERED, FAMILIES, config_of, save_tiny
from torch.nn import functional

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.kernels.token_statistics import TokenStatistics
from headrace.schemas.errors import ConfigError
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.stage.tensor_check import Exchange, ThreadShard
from headrace.trainer.tensor_parallel.sharded_cross_entropy import sharded_cross_entropy

LORA = {"rank": 4}
REFUSED = {
    "cohere": "a tiny one cannot be run in parts",  # norms of single heads
    "gpt_neox": "the model's own dropout",
    "falcon": "transformers has no plan",
    "phi": r"a bias beside inputs that are cut \(model.layers.0.self_attn.dense.bias\)",
    "starcoder2": "a bias beside inputs that are cut",
}
TRIED = ("llama", "phi3", "qwen3_moe")


def plan_in_parts(family, directory, ranks=2):
    model = save_tiny(family, directory, vocab_size=96)
    return plan_model(config_of(model, tensor_parallel=ranks, adapter=LORA))


@pytest.mark.parametrize("family", TRIED)
def test_a_tiny_model_in_parts_passes_its_trial(family, tmp_path):
    plan_in_parts(family, tmp_path / "model")


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", sorted({*FAMILIES, *DISCOVERED} - {*REFUSED, *TRIED}))
def test_all_other_families_pass_their_trial(family, tmp_path):
    plan_in_parts(family, tmp_path / "model")


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_are_not_cut_are_refused_by_name(family, tmp_path):
    with pytest.raises(ConfigError, match=f'model_type "{family}": {REFUSED[family]}'):
        plan_in_parts(family, tmp_path / "model")


def test_weights_that_the_ranks_do_not_divide_are_refused_by_name(tmp_path):
    line = "tensor_parallel = 3 does not divide the 4 heads of model.layers.0.self_attn.q_proj"
    with pytest.raises(ConfigError, match=line):
        plan_in_parts("llama", tmp_path / "model", ranks=3)


def test_key_heads_that_the_ranks_do_not_divide_are_refused_by_name(tmp_path):
    line = "tensor_parallel = 4 does not divide the 2 heads of model.layers.0.self_attn.k_proj"
    with pytest.raises(ConfigError, match=line):
        plan_in_parts("llama", tmp_path / "model", ranks=4)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"adapter": {"kind": "control"}}, 'adapter.kind = "control"'),
        ({"adapter": {"init": "pissa"}}, 'adapter.init = "pissa"'),
        ({"optimizer": {"lr": 1.0, "type": "adafactor"}}, 'optimizer.type = "adafactor"'),
        ({"objective": {"kind": "dpo"}}, 'objective.kind = "dpo"'),
    ],
)
def test_what_needs_whole_weights_is_refused_by_its_key(settings, key):
    with pytest.raises(ValidationError, match=f"tensor_parallel = 2 does not go with {key}"):
        config_of("unused", tensor_parallel=2, **{"adapter": LORA, **settings})


def test_the_loss_over_a_cut_vocabulary_is_that_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 12, generator=generator) * 4
    labels = torch.randint(0, 12, (9,), generator=generator)
    labels[2] = IGNORED_LABEL
    factors = torch.rand(9, generator=generator)
    whole, statistics = logits.clone().requires_grad_(), TokenStatistics.empty(9, logits.device)
    expected = functional.cross_entropy(whole, labels, reduction="none")
    statistics.fill(logits, labels, expected.detach())
    (expected * factors).sum().backward()
    exchange = Exchange()

    def run(rank):
        shard = ThreadShard(rank, 2, exchange)
        part, found = (
            shard.share(logits, 1).clone().requires_grad_(),
            TokenStatistics.empty(9, "cpu"),
        )
        losses = sharded_cross_entropy(part, labels, shard, found)
        (losses * factors).sum().backward()
        return losses.detach(), part.grad, found

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(run, range(2)))
    trained = labels != IGNORED_LABEL
    for losses, _, found in parts:
        torch.testing.assert_close(losses, expected.detach())
        torch.testing.assert_close(found.entropy[trained], statistics.entropy[trained])
        assert torch.equal(found.rank[trained], statistics.rank[trained])
    torch.testing.assert_close(torch.cat([gradient for _, gradient, _ in parts], 1), whole.grad)
