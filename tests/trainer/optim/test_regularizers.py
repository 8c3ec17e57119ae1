"""Adapters are held back by r x r products as by whole ones; embeddings get NEFTune's noise."""

import pytest
import torch
from tiny_families import LAYERS, build, config_of, save_tiny
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.schemas.train.optimizer_config import RegularizationConfig
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.optim.regularizers import Pair, find_pairs, product_norm, regularize
from headrace.trainer.run.optimizer_step import hold_back
from headrace.trainer.stage.embedding import embedding_noise

SETTINGS = {
    "model": "m",
    "output_dir": "o",
    "datasets": [{"path": "d"}],
    "optimizer": {"lr": 1e-4},
}


def pair(seed=0, rank=8, inputs=160, outputs=96, scale=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, inputs, generator=generator), torch.zeros(outputs, rank)
    up.normal_(generator=generator)
    return Pair(down.to(dtype), up.to(dtype), scale)


def test_decay_is_the_gradient_of_the_products_square():
    ours, exact = pair(), pair(dtype=torch.float64)
    rate, decay = 1e-3, 0.5
    regularize(RegularizationConfig(product_decay=decay), [ours], rate)

    down, up = exact.down.requires_grad_(), exact.up.requires_grad_()
    (0.5 * (up @ down).square().sum()).backward()
    for found, start in ((ours.down, down), (ours.up, up)):
        moved = rate * decay * start.grad
        expected = start.detach() - moved
        assert torch.linalg.vector_norm(found.double() - expected) < 1e-5 * moved.norm()


def test_the_norm_is_that_of_what_the_adapter_adds():
    ours, exact = pair(), pair(dtype=torch.float64)
    expected = torch.linalg.matrix_norm(exact.scale * (exact.up @ exact.down))
    assert float(product_norm(ours)) == pytest.approx(float(expected), rel=1e-6)


def test_only_products_that_are_too_large_are_scaled_to_the_limit():
    large, small = pair(0), pair(1, scale=1e-3)
    kept = small.down.clone(), small.up.clone()
    limit = 0.5 * float(product_norm(large))
    before = large.up @ large.down
    result = regularize(RegularizationConfig(max_product_norm=limit), [large, small], 1e-3)
    assert (result.scaled, len(result.norms)) == (1, 2)
    assert result.norms[0] == pytest.approx(2 * limit)
    torch.testing.assert_close(large.up @ large.down, 0.5 * before)
    assert torch.equal(small.down, kept[0]) and torch.equal(small.up, kept[1])


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.entries = max(self.entries, made.numel())
        return made


def test_the_product_is_never_formed():
    """qlora-pipe's bug 3.1.15 and qlora-pipe-lite's 3.2.12: B @ A for every adapter, each step."""
    adapter = pair(rank=4, inputs=200, outputs=100)
    with Largest() as largest:
        regularize(RegularizationConfig(product_decay=0.1, max_product_norm=1.0), [adapter], 1e-3)
    assert 0 < largest.entries <= 4 * 200


def test_nothing_is_measured_where_nothing_is_asked_for():
    """qlora-pipe's bug 3.1.15: norms were taken with the feature off."""
    adapter = pair()
    with Largest() as largest:
        assert regularize(RegularizationConfig(), [adapter], 1e-3) is None
    assert largest.entries == 0
    assert not RegularizationConfig().limits_products


def test_noise_is_uniform_and_as_large_as_the_rows_length_says():
    hidden = torch.zeros(2, 64, 32)
    noise = embedding_noise(hidden, [64, 16], alpha=5.0, seed=3)
    for row, tokens in zip(noise, (64, 16), strict=True):
        largest = 5.0 / (tokens * 32) ** 0.5
        assert float(row.abs().max()) == pytest.approx(largest, rel=0.01)
        assert float(row.std()) == pytest.approx(largest / 3**0.5, rel=0.05)
    again = embedding_noise(hidden, [64, 16], alpha=5.0, seed=3)
    assert torch.equal(again, noise)
    assert not torch.equal(embedding_noise(hidden, [64, 16], alpha=5.0, seed=4), noise)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularization": {"product_decay": 1.0}, "adapter": {"kind": "none"}}, "no meaning"),
        ({"relora": {"every_steps": 20}, "adapter": {"kind": "dora"}}, "no meaning"),
        ({"relora": {"every_steps": 20}, "adapter": {"init": "pissa"}}, 'needs adapter.init = "ka'),
        ({"relora": {"every_steps": 5}}, "must be below every_steps = 5"),
        ({"relora": {"every_steps": 20}, "objective": {"kind": "dpo"}}, "compares with the weight"),
        (
            {
                "regularization": {"product_decay": 1.0},
                "optimizer": {"type": "adamw_kahan", "lr": 1e-4},
            },
            "needs float32 adapters",
        ),
        (
            {
                "scheduler": {"type": "cosine"},
                "optimizer": {"type": "adamw_schedule_free", "lr": 1e-4},
            },
            "takes the place of a falling learning rate",
        ),
        ({"optimizer": {"type": "adam", "lr": 1e-4, "weight_decay": 0.1}}, "has no decay"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate(SETTINGS | settings)


@pytest.mark.parametrize(
    ("adapter", "measured"),
    [
        ({"kind": "lora", "rank": 4}, True),
        ({"kind": "dora", "rank": 4}, True),
        ({"kind": "none"}, False),
        ({"kind": "blocks", "blocks": 1}, False),
    ],
)
def test_norms_of_adapters_are_measured_without_a_limit(adapter, measured, tmp_path):
    (built,) = build(config_of(save_tiny("llama", tmp_path / "model"), 1, adapter))
    config = RegularizationConfig()
    assert hold_back(config, built, 1e-3) is None
    found = hold_back(config, built, 1e-3, measures=True)
    if not measured:
        assert found is None
        return
    assert found.scaled is None
    assert found.norms == [0.0] * 7 * LAYERS  # B begins at zero
    pair = find_pairs(built.names)[3]
    with torch.no_grad():
        pair.up.fill_(0.5)
    found = hold_back(config, built, 1e-3, measures=True)
    product = pair.scale * (pair.up @ pair.down)
    assert found.norms[3] == pytest.approx(product.norm().item(), rel=1e-5)
