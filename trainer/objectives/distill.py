"""Distillation: the student's distribution of each next token is brought to the teacher's.

The divergence is TRL's generalized Jensen-Shannon divergence (https://arxiv.org/abs/2306.13649):
with p the teacher's distribution and q the student's, both at a temperature, and m = beta p +
(1 - beta) q, it is beta KL(p || m) + (1 - beta) KL(q || m); KL(p || q) at beta = 0, and at 1
KL(q || p).
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headrace.kernels.linear_cross_entropy import CHUNK_LOGITS, IGNORED_LABEL
from headrace.trainer.objectives.objective import CrossEntropy
from headrace.trainer.stage.head_loss import vocabulary
from headrace.trainer.stage.loss import LossInputs
from headrace.trainer.stage.micro_batch import StageOutput


class Distill(CrossEntropy):
    """Sum over tokens of the divergence, and of their cross-entropy with the rest of the weight."""

    takes_teacher = True

    def loss(self, inputs: LossInputs) -> StageOutput:
        weight = self.config.teacher_weight
        with torch.set_grad_enabled(weight < 1 and torch.is_grad_enabled()):
            losses = inputs.token_losses()
        adjusted = weight * self.divergences(inputs)
        if weight < 1:
            adjusted = adjusted + (1 - weight) * losses
        loss = adjusted.sum() * inputs.micro_batch.loss_scale
        return StageOutput(loss, losses.detach(), adjusted.detach(), statistics=inputs.statistics)

    def divergences(self, inputs: LossInputs) -> Tensor:
        """Return the divergence of each trained token, [b, s], 0 elsewhere.

        Logits of some tokens are there at a time; the backward pass computes them again.
        """
        labels, seed = inputs.labels, inputs.seed
        assert inputs.taught is not None
        trained = (labels.reshape(-1) != IGNORED_LABEL).nonzero().squeeze(1)
        own, other = (states.flatten(0, 1)[trained] for states in (inputs.hidden, inputs.taught))
        size, parts = max(1, CHUNK_LOGITS // vocabulary(inputs.head.head)), []
        for number, start in enumerate(range(0, len(trained), size)):
            chunk = slice(start, start + size)
            chunk_seed = None if seed is None else seed + number
            arguments = (inputs, own[chunk], other[chunk], chunk_seed)
            parts.append(
                checkpoint(
                    self._of_chunk, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            )
        found = torch.cat(parts) if parts else own.sum(-1).float()
        nothing = torch.zeros(labels.numel(), device=found.device)
        return nothing.index_copy(0, trained, found).view(labels.shape)

    def _of_chunk(self, inputs: LossInputs, own: Tensor, other: Tensor, seed: int | None) -> Tensor:
        assert inputs.teacher is not None
        if seed is not None:
            torch.manual_seed(seed)
        temperature = self.config.temperature
        student = torch.log_softmax(inputs.head.logits(own) / temperature, dim=-1)
        with torch.no_grad():
            teacher = torch.log_softmax(inputs.teacher.logits(other) / temperature, dim=-1)
        return divergence(teacher, student, self.config.divergence)


def divergence(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Return the divergence of each token, [n], of log-probabilities [n, vocabulary]."""
    if beta == 0:
        return kullback_leibler(teacher, student)
    if beta == 1:
        return kullback_leibler(student, teacher)
    mixed = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    both = (kullback_leibler(teacher, mixed), kullback_leibler(student, mixed))
    return beta * both[0] + (1 - beta) * both[1]


def kullback_leibler(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(first || second) of each token, in nats."""
    return (first.exp() * (first - second)).sum(-1)
