"""The optimizer around the AdamW-Kahan kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.adamw_kahan import AdamWStep, adamw_kahan_reference


class AdamWKahan(torch.optim.Optimizer):
    """AdamW with states in the weights' own type, and what rounding took from them.

    Args:
        triton: one kernel a tensor instead of its plain twin.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        *,
        triton: bool,
    ) -> None:
        super().__init__(groups, {"lr": lr})
        self.betas, self.eps = betas, eps
        self.update = adamw_kahan_reference
        if triton:
            from headrace.kernels.adamw_kahan_triton import adamw_kahan_pass

            self.update = adamw_kahan_pass

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue  # as torch's optimizers do
                state = self.state[weight] or self._fresh_state(weight)
                state["step"] = state["step"].cpu() + 1  # where it is read without waiting
                step = AdamWStep(
                    group["lr"],
                    *self.betas,
                    self.eps,
                    group["weight_decay"],
                    int(state["step"]),
                )
                moments = (state["exp_avg"], state["exp_avg_sq"], state["compensation"])
                self.update(weight, weight.grad, *moments, step)

    def _fresh_state(self, weight: Tensor) -> dict[str, Tensor]:
        self.state[weight] = {
            "step": torch.zeros(()),
            **{
                name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq", "compensation")
            },
        }
        return self.state[weight]
