"""Muon for hidden matrices (https://arxiv.org/abs/2502.16982), AdamW for all else."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon and its AdamW over groups and states that they share with this one.

    Args:
        groups: with "orthogonal": whether Muon steps them; its parameters are matrices.
        betas, eps: AdamW's.
        momentum: Muon's.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__(groups, {"lr": lr})
        matrices = [group for group in self.param_groups if group["orthogonal"]]
        others = [group for group in self.param_groups if not group["orthogonal"]]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"
            )
            self.parts.append(muon)
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True))
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self.parts:
            part.step()
