"""NEFTune: uniform noise on the embeddings of training rows (https://arxiv.org/abs/2310.05914)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.trainer.model.device import to_device


def embedding_noise(hidden: Tensor, lengths: Sequence[int], alpha: float, seed: int) -> Tensor:
    """Noise of at most alpha / sqrt(n d) for each entry of a row of n tokens.

    Args:
        hidden: [b, s, d], whose shape, type and device the noise takes.
        lengths: [b] tokens of each row, filling left out.
        seed: of this micro-batch, so that every layout draws the same.
    """
    generator = torch.Generator(hidden.device).manual_seed(seed)
    unit = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    unit.uniform_(-1, 1, generator=generator)
    tokens = to_device(torch.tensor(lengths, dtype=torch.float32).clamp(min=1), hidden.device)
    largest = alpha * torch.rsqrt(tokens * hidden.shape[-1])
    return (unit * largest[:, None, None]).to(hidden.dtype)
