"""Values of a stage's micro-batches beside gradients, copied to the host while it goes on."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.trainer import devices
from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.metrics.token_summary import TokenSample
from headrace.trainer.objectives.row_loss import TokenValues
from headrace.trainer.sequence_slice import SequenceSlice
from headrace.trainer.stage.micro_batch import StageOutput


class StepValues:
    """Begins the transfer of everything; each part is read where it is wanted.

    Args:
        outputs: of the micro-batches, on the last stage.
        router_losses: scalars, on stages with routers.
        sequence: the slice of every row that the outputs are of; values are of whole rows.
        slices: in which rows have gone through the stages, each shared among the ranks.
    """

    def __init__(
        self,
        outputs: Sequence[StageOutput],
        router_losses: Sequence[Tensor],
        sequence: SequenceSlice,
        slices: int = 1,
    ) -> None:
        tokens = [token_values(output) for output in outputs]
        self._kinds = list(tokens[0]) if tokens else []
        stacked = [torch.stack([values[kind] for values in tokens]) for kind in self._kinds]
        self._tokens: HostCopy | None = None
        if stacked:
            values = sequence.join(torch.stack(stacked)).unflatten(-1, (sequence.ranks, slices, -1))
            self._tokens = HostCopy(values.transpose(-3, -2).flatten(-3))
        pairs = [output.pairs for output in outputs if output.pairs is not None]
        rewards = [torch.stack(list(vars(values).values()), dim=1) for values in pairs]
        self._pairs = HostCopy(torch.cat(rewards)) if rewards else None
        self._router = HostCopy(torch.stack(list(router_losses))) if router_losses else None

    def tokens(self) -> TokenValues:
        """Return the values of tokens, on the last stage."""
        assert self._tokens is not None
        return TokenValues(**dict(zip(self._kinds, self._tokens.get(), strict=True)))

    def pairs(self) -> list[list[float]] | None:
        """Return the fields of `PairLosses` or `AnswerLosses`, each pair's or answer's, if any."""
        return None if self._pairs is None else self._pairs.get().tolist()

    def router_losses(self) -> list[float]:
        """Return the losses of the micro-batches; none on stages without routers."""
        return [] if self._router is None else self._router.get().tolist()


def token_values(output: StageOutput) -> dict[str, Tensor]:
    """Return a micro-batch's values, by the names in `TokenValues`; each [b, s] float32."""
    assert output.token_losses is not None
    values = {"losses": output.token_losses}
    if output.adjusted_losses is not None:
        values["adjusted"] = output.adjusted_losses
    if output.statistics is not None and output.hidden_norms is not None:
        shape = output.token_losses.shape
        values["entropies"] = output.statistics.entropy.view(shape)
        values["ranks"] = output.statistics.rank.view(shape).float()  # exact below 2^24
        values["hidden_norms"] = output.hidden_norms
    return values


def sample_of(tokens: TokenValues, inputs: StepInputs, vocabulary: int) -> TokenSample | None:
    """The trained tokens of a step's micro-batches; None if their statistics were not wanted."""
    if tokens.entropies is None or tokens.ranks is None or tokens.hidden_norms is None:
        return None
    assert inputs.labels is not None
    trained = inputs.labels.numpy() != IGNORED_LABEL
    if any(extras.in_halves for extras in inputs.extras):
        trained[:, trained.shape[1] // 2 :] = False  # rejected or mismatched answers
    return TokenSample(
        tokens.losses[trained],
        tokens.entropies[trained],
        tokens.ranks[trained],
        tokens.hidden_norms[trained],
        vocabulary,
    )


class HostCopy:
    """Begins to copy a tensor; `get` waits for that copy and nothing that was queued after it."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor.detach().to("cpu", non_blocking=True)  # to pinned memory
        self._done = devices.record_event(tensor.device)

    def get(self) -> NDArray[Any]:
        """The values, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        values: NDArray[Any] = self._values.numpy()
        return values
