"""What a stage's micro-batches gave beside gradients, brought to the host while it goes on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.trainer.model.micro_batch import StageOutput
from headrace.trainer.run.host_copy import HostCopy

Values = NDArray[np.float32]


@dataclass(frozen=True)
class TokenValues:
    """Of the last stage's m micro-batches, each [m, b, s]."""

    losses: Values  # cross-entropy in nats, 0 where a token has no label
    adjusted: Values | None = None  # what is minimised in its place


class StepValues:
    """Begins the transfer of everything; each part is read where it is wanted.

    Args:
        outputs: of the micro-batches, on the last stage.
        router_losses: scalars, on stages with routers.
    """

    def __init__(self, outputs: Sequence[StageOutput], router_losses: Sequence[Tensor]) -> None:
        tokens = {
            "losses": [output.token_losses for output in outputs],
            "adjusted": [output.adjusted_losses for output in outputs],
        }
        known = {kind: [v for v in values if v is not None] for kind, values in tokens.items()}
        self._kinds = [kind for kind, values in known.items() if values]
        stacked = [torch.stack(known[kind]) for kind in self._kinds]
        self._tokens = HostCopy(torch.stack(stacked)) if stacked else None
        pairs = [output.pairs for output in outputs if output.pairs is not None]
        rewards = [torch.stack([p.loss, p.chosen_reward, p.rejected_reward], dim=1) for p in pairs]
        self._pairs = HostCopy(torch.cat(rewards)) if rewards else None
        self._router = HostCopy(torch.stack(list(router_losses))) if router_losses else None

    def tokens(self) -> TokenValues:
        """On the last stage."""
        assert self._tokens is not None
        return TokenValues(**dict(zip(self._kinds, self._tokens.get(), strict=True)))

    def pairs(self) -> list[list[float]]:
        """Loss, chosen and rejected reward of each pair, on the last stage."""
        assert self._pairs is not None
        rows: list[list[float]] = self._pairs.get().tolist()
        return rows

    def router_losses(self) -> list[float]:
        """Of the micro-batches; none on stages without routers."""
        return [] if self._router is None else self._router.get().tolist()
