"""Tokens are drawn as their probabilities say, by noise that a seed alone decides."""

import pytest
import torch
from transformers import MinPLogitsWarper, TopPLogitsWarper

from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.train.objective_config import RejectedSamplingConfig
from headrace.trainer.pipeline.token_sampler import choose, leave_out, signed, uniform

DRAWS = 10_000
LOGITS = torch.tensor([1.2, -0.3, 2.0, 0.1, -3.0, 0.9, 1.9, -1.0])


def seeds(count, root=0):
    return torch.tensor([signed(derive_seed(root, number)) for number in range(count)])


def settings(**values):
    return RejectedSamplingConfig.model_validate(values)


def shares_of(config):
    drawn = choose(LOGITS.expand(DRAWS, -1), seeds(DRAWS), config)
    return torch.bincount(drawn, minlength=len(LOGITS)) / DRAWS


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, LOGITS.softmax(0)),
        ({"temperature": 0.5}, (LOGITS / 0.5).softmax(0)),
        ({"temperature": 2.0, "min_p": 0.5}, None),
        ({"temperature": 2.0, "min_p": 0.5, "temperature_last": True}, None),
        ({"temperature": 2.0, "top_p": 0.6}, None),
        ({"temperature": 2.0, "top_p": 0.6, "temperature_last": True}, None),
    ],
)
def test_tokens_are_drawn_by_their_probabilities(values, expected):
    config = settings(**values)
    if expected is None:
        first = 1.0 if config.temperature_last else config.temperature
        left = leave_out(LOGITS.unsqueeze(0) / first, config)[0]
        expected = (left * first / config.temperature).softmax(0)
        assert 1 < (expected > 0).sum() < len(LOGITS)
    shares = shares_of(config)
    assert (shares[expected == 0] == 0).all()
    kept = expected > 0
    surprise = DRAWS * ((shares - expected)[kept] ** 2 / expected[kept]).sum()
    assert surprise < 30  # chi-square of at most 7 degrees: beyond it by chance once in 10,000


def test_the_temperature_decides_what_is_left_out_unless_it_comes_last():
    hot = settings(temperature=4.0, min_p=0.5)
    assert (shares_of(hot) > 0).sum() > (
        shares_of(hot.model_copy(update={"temperature_last": True})) > 0
    ).sum()


@pytest.mark.parametrize("share", [0.05, 0.4, 0.9, 0.999])
def test_what_is_left_out_is_what_transformers_leaves_out(share):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, 97, generator=generator) * 3
    for config, theirs in (
        (settings(top_p=share), TopPLogitsWarper(share)),
        (settings(min_p=share), MinPLogitsWarper(share)),
    ):
        assert torch.equal(leave_out(logits, config), theirs(None, logits))


def test_noise_is_that_of_splitmix64_and_of_the_seed_alone():
    # the first numbers of the reference implementation with seed 1234567
    numbers = uniform(torch.tensor([1234567]), 3)[0]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert (numbers * 2**52).floor().long().tolist() == [number >> 12 for number in expected]
    many = seeds(20)
    together = uniform(many, 1000)
    assert torch.equal(together[7:8], uniform(many[7:8], 1000))
    assert 0 < together.min() < together.max() < 1
    assert together.mean().item() == pytest.approx(0.5, abs=0.01)


def test_other_rows_change_no_draw_and_a_last_bit_hardly_any():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(100, 300, generator=generator)
    drawn = choose(logits, seeds(100), settings())
    assert torch.equal(choose(logits[3:4], seeds(4)[3:], settings()), drawn[3:4])
    nearly = logits * (1 + 1e-6 * torch.randn(logits.shape, generator=generator))
    assert torch.equal(choose(nearly, seeds(100), settings()), drawn)
    assert not torch.equal(choose(logits, seeds(100, root=1), settings()), drawn)


def test_temperature_zero_takes_the_likeliest():
    assert choose(LOGITS.unsqueeze(0), seeds(1), settings(temperature=0)).tolist() == [2]
