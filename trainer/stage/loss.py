"""The head of the last stage, and the cross-entropy over it."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headrace.kernels.token_statistics import TokenStatistics
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.sequence_slice import WHOLE, SequenceSlice
from headrace.trainer.stage.head_loss import (
    LogitShape,
    head_loss,
    head_token_losses,
    is_plain,
    logits_of,
)
from headrace.trainer.stage.micro_batch import MicroBatch
from headrace.trainer.tensor_parallel.shard import WHOLE_WEIGHTS, TensorShard


class StageLoss:
    """Hidden states after the norm in, losses out.

    Args:
        head: the model's own, adapted or not.
        autocast: run it in `dtype` though its weights are float32.
        triton: compute the loss in Triton.
        sequence: the slice of every row that hidden states are of.
        shard: the part of the tokens whose logits are computed here.
    """

    def __init__(
        self,
        head: nn.Module,
        architecture: Architecture,
        dtype: torch.dtype,
        *,
        autocast: bool,
        triton: bool = False,
        sequence: SequenceSlice = WHOLE,
        shard: TensorShard = WHOLE_WEIGHTS,
    ) -> None:
        self.head = head
        self.shard = shard
        self.is_plain = is_plain(head) and shard.is_whole
        self.sequence = sequence
        family = architecture.family
        divisor = architecture.setting(family.logit_divisor, 1.0) or 1.0
        multiplier = architecture.setting(family.logit_multiplier, 1.0) or 1.0
        self.shape = LogitShape(multiplier / divisor, architecture.setting(family.logit_softcap))
        self.dtype = dtype
        self.autocast = autocast
        self.triton = triton

    def cross_entropy(
        self,
        hidden: Tensor,
        labels: Tensor,
        scale: float,
        seed: int | None,
        statistics: TokenStatistics | None,
    ) -> tuple[Tensor, Tensor]:
        """Return `scale` times the sum over tokens, and each token's without gradient, [b, s].

        Args:
            hidden: [b, s, hidden size].
            seed: of the head's own dropout; None if it has none.
            statistics: of all tokens, to be filled in.
        """
        arguments = (self.head, self._rows(hidden), labels.reshape(-1), scale, self.shape)
        if self.is_plain:
            loss, losses = head_loss(*arguments, triton=self.triton, statistics=statistics)
        else:
            with self._precision(hidden):
                loss, losses = head_loss(*arguments, seed, statistics=statistics, shard=self.shard)
        return loss, losses.view(labels.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden size] to [rows, vocabulary], float32."""
        with self._precision(hidden):
            return logits_of(self.head, self._rows(hidden), self.shape)

    def scores(self, rows: Tensor, seed: int | None) -> Tensor:
        """[n, hidden size] to [n] float32, by a head of one number."""
        if seed is not None:
            torch.manual_seed(seed)
        with self._precision(rows):
            scores: Tensor = self.head(rows.to(self.dtype))
        return scores.float().squeeze(-1)

    def token_losses(
        self,
        hidden: Tensor,
        labels: Tensor,
        seed: int | None,
        factor: float = 1.0,
        *,
        statistics: TokenStatistics | None = None,
    ) -> Tensor:
        """Per-token cross-entropy of `factor` times the logits, [b, s], to be differentiated."""
        shape = self.shape.times(factor)
        arguments = (self.head, self._rows(hidden), labels.reshape(-1), shape)
        options: Any = {"triton": self.triton, "statistics": statistics, "shard": self.shard}
        with contextlib.nullcontext() if self.is_plain else self._precision(hidden):
            losses = head_token_losses(*arguments, seed, **options)
        return losses.view(labels.shape)

    def _rows(self, hidden: Tensor) -> Tensor:
        return hidden.reshape(-1, hidden.shape[-1]).to(self.dtype)

    def _precision(self, hidden: Tensor) -> torch.autocast:
        return torch.autocast(hidden.device.type, self.dtype, enabled=self.autocast)


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Inputs of the loss of a micro-batch, on the last stage.

    Attributes:
        hidden: [b, s, hidden size] after the norm.
        labels: [b, s].
        seed: of the head's own dropout; None if it has none.
        statistics: of all tokens, to be filled in.
        before: [b, s] losses of the model as it was before training.
        teacher, taught: the head of a teacher, and its hidden states after the norm.
    """

    head: StageLoss
    hidden: Tensor
    micro_batch: MicroBatch
    labels: Tensor
    seed: int | None
    statistics: TokenStatistics | None
    before: Tensor | None = None
    teacher: StageLoss | None = None
    taught: Tensor | None = None

    def token_losses(self) -> Tensor:
        """Per-token cross-entropy, [b, s], to be differentiated; fills the statistics in."""
        return self.head.token_losses(
            self.hidden, self.labels, self.seed, statistics=self.statistics
        )
