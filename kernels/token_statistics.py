"""Statistics of each token's logits beside its loss, computed without keeping the logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """Written while the logits exist; what stands at ignored labels means nothing.

    `entropy`: [tokens] float32, of the predicted distribution, in nats.
    `rank`: [tokens] int32, how many logits are larger than the label's; top-k accuracy is the share
    of tokens below k.
    """

    entropy: Tensor
    rank: Tensor

    @classmethod
    def empty(cls, tokens: int, device: torch.device) -> "TokenStatistics":
        """Allocate statistics whose values are not set yet."""
        entropy = torch.empty(tokens, dtype=torch.float32, device=device)
        return cls(entropy, torch.empty(tokens, dtype=torch.int32, device=device))

    def __getitem__(self, tokens: slice) -> "TokenStatistics":
        """A view of some tokens."""
        return TokenStatistics(self.entropy[tokens], self.rank[tokens])

    @torch.no_grad()
    def fill(self, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Compute the statistics in plain torch: the twin of the Triton kernel.

        Args:
            logits: [tokens, vocabulary] float32.
            losses: [tokens] their cross-entropy.
        """
        at_label = logits.gather(1, labels.clamp(min=0).unsqueeze(1))
        mean_logit = torch.linalg.vecdot(torch.softmax(logits, dim=-1), logits)
        self.entropy.copy_(losses + at_label[:, 0] - mean_logit)
        self.rank.copy_((logits > at_label).sum(-1, dtype=torch.int32))
