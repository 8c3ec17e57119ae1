"""The next token, drawn with noise that depends on a seed alone: not on device, batch or layout."""

import torch
from torch import Tensor

from headrace.schemas.keyed_hash import FACTORS, GOLDEN, mix
from headrace.schemas.train.objective_config import RejectedSamplingConfig

BITS = 52  # of a random number: with the half after them, all that a double holds


def choose(logits: Tensor, seeds: Tensor, settings: RejectedSamplingConfig) -> Tensor:
    """One token for each row, by the Gumbel-max trick: the noise of a token is its own.

    So logits that differ in their last bits give another token only where two are as good as even.

    Args:
        logits: [rows, vocabulary] float32.
        seeds: [rows] int64, another for each token of each answer.

    Returns:
        [rows] int64.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    if settings.temperature_last:
        logits = leave_out(logits, settings) / settings.temperature
    else:
        logits = leave_out(logits / settings.temperature, settings)
    noise = -torch.log(-torch.log(uniform(seeds, logits.shape[-1])))
    return (logits + noise).argmax(dim=-1)


def leave_out(logits: Tensor, settings: RejectedSamplingConfig) -> Tensor:
    """Logits with -inf for tokens that `top_p`, then `min_p`, leave out; never for the likeliest.

    Sources: https://arxiv.org/abs/1904.09751 (nucleus), https://arxiv.org/abs/2407.01082 (min-p).
    """
    if settings.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        shares = ordered.softmax(dim=-1)
        enough = shares.cumsum(dim=-1) - shares >= settings.top_p
        logits = logits.masked_fill(enough.scatter(-1, order, enough), -torch.inf)
    if settings.min_p > 0:
        shares = logits.softmax(dim=-1)
        least = settings.min_p * shares.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(shares < least, -torch.inf)
    return logits


def uniform(seeds: Tensor, count: int) -> Tensor:
    """[rows, count] float64 in (0, 1): the first numbers of the SplitMix64 stream of each seed.

    Args:
        seeds: [rows] int64.
    """
    numbers = torch.arange(1, count + 1, device=seeds.device)
    stream = seeds.unsqueeze(1) + numbers * signed(GOLDEN)
    mixed = mix(stream, _shift, (signed(FACTORS[0]), signed(FACTORS[1])))
    return (_shift(mixed, 64 - BITS).double() + 0.5) * 2.0**-BITS


def signed(number: int) -> int:
    """Return an unsigned 64-bit number as torch holds it."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _shift(numbers: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros, which torch does for unsigned numbers only."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
