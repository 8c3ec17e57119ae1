"""The head of the last stage, and what is minimized over it."""

import contextlib

import torch
from torch import Tensor, nn

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.kernels.token_statistics import TokenStatistics
from headrace.schemas.train.objective_config import ObjectiveConfig
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.stage.head_loss import (
    LogitShape,
    head_loss,
    head_token_losses,
    is_plain,
    logits_of,
)
from headrace.trainer.stage.micro_batch import MicroBatch, StageOutput
from headrace.trainer.stage.objectives import (
    adjusted_losses,
    logit_factor,
    pair_losses,
    sum_answers,
)


class StageLoss:
    """Hidden states after the norm in, losses out.

    Args:
        head: the model's own, adapted or not.
        autocast: run it in `dtype` though its weights are float32.

    Attributes:
        triton: the loss is computed in Triton.
    """

    def __init__(
        self, head: nn.Module, architecture: Architecture, dtype: torch.dtype, *, autocast: bool
    ) -> None:
        self.head = head
        family = architecture.family
        divisor = architecture.setting(family.logit_divisor, 1.0) or 1.0
        multiplier = architecture.setting(family.logit_multiplier, 1.0) or 1.0
        self.shape = LogitShape(multiplier / divisor, architecture.setting(family.logit_softcap))
        self.dtype = dtype
        self.autocast = autocast
        self.triton = False

    def of_tokens(
        self,
        hidden: Tensor,
        micro_batch: MicroBatch,
        objective: ObjectiveConfig,
        seed: int | None,
        statistics: TokenStatistics | None,
    ) -> StageOutput:
        """Objectives that are sums over tokens.

        Args:
            hidden: [b, s, hidden size].
            seed: of the head's own dropout; None if it has none.
            statistics: of all tokens, to be filled in.
        """
        labels, scale = micro_batch.labels, micro_batch.loss_scale
        assert labels is not None
        if objective.kind == "cross_entropy":
            arguments = (self.head, self._rows(hidden), labels.reshape(-1), scale, self.shape)
            if is_plain(self.head):
                loss, token_losses = head_loss(
                    *arguments, triton=self.triton, statistics=statistics
                )
            else:
                with self._precision(hidden):
                    loss, token_losses = head_loss(*arguments, seed, statistics=statistics)
            return StageOutput(loss, token_losses.view(labels.shape), statistics=statistics)
        factor = logit_factor(objective)
        first = statistics if factor == 1.0 else None  # they are of the logits as they are
        losses = self.token_losses(hidden, labels, seed, factor, statistics=first)
        adjusted = adjusted_losses(losses, objective)
        if factor != 1.0:
            with torch.no_grad():
                losses = self.token_losses(hidden, labels, seed, statistics=statistics)
        return StageOutput(
            adjusted.sum() * scale, losses.detach(), adjusted.detach(), statistics=statistics
        )

    def of_pairs(
        self,
        hidden: Tensor,
        micro_batch: MicroBatch,
        objective: ObjectiveConfig,
        seed: int | None,
        before: Tensor | None,
        statistics: TokenStatistics | None,
    ) -> StageOutput:
        """Objectives of chosen and rejected answers.

        Args:
            before: [b, s] losses of the model as it was before training.
            statistics: as in `of_tokens`.
        """
        labels, pair_lengths = micro_batch.labels, micro_batch.pairs
        assert labels is not None and pair_lengths is not None
        losses = self.token_losses(hidden, labels, seed, statistics=statistics)
        answers = sum_answers(losses, before, labels != IGNORED_LABEL, pair_lengths)
        pairs = pair_losses(*answers, objective)
        chosen = losses[: len(pair_lengths)].sum()  # a sum over no pairs has no gradient
        weight = objective.chosen_weight * micro_batch.chosen_scale
        loss = pairs.loss.sum() * micro_batch.loss_scale + chosen * weight
        return StageOutput(loss, losses.detach(), pairs=pairs.detach(), statistics=statistics)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden size] to [rows, vocabulary], float32."""
        with self._precision(hidden):
            return logits_of(self.head, self._rows(hidden), self.shape)

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
        plain = is_plain(self.head)
        with contextlib.nullcontext() if plain else self._precision(hidden):
            losses = head_token_losses(*arguments, seed, triton=self.triton, statistics=statistics)
        return losses.view(labels.shape)

    def _rows(self, hidden: Tensor) -> Tensor:
        return hidden.reshape(-1, hidden.shape[-1]).to(self.dtype)

    def _precision(self, hidden: Tensor) -> torch.autocast:
        return torch.autocast(hidden.device.type, self.dtype, enabled=self.autocast)
