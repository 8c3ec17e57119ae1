"""One pipeline stage: decoder layers, the embedding before the first, the head after the last."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headrace.kernels.linear_cross_entropy import linear_cross_entropy
from headrace.schemas.fingerprint import derive_seed
from headrace.trainer.batch import document_mask, position_ids


@dataclass(frozen=True)
class MicroBatch:
    """What a stage needs beside the hidden states. b rows of s tokens."""

    document_lengths: list[list[int]]  # [b]
    labels: Tensor | None  # [b, s] int64, last stage only
    loss_scale: float  # 1 / trained tokens of the global batch
    seed: int  # of this micro-batch's dropout


@dataclass(frozen=True)
class LossOutput:
    """What the last stage returns: the scalar to differentiate; token losses, [b, s] float32."""

    loss: Tensor
    token_losses: Tensor


class Stage(nn.Module):
    """The modules of one stage under the names that they have in the whole (PEFT-wrapped) model.

    Hidden states of one fixed shape, [b, s, hidden size] in the compute type, are all that passes
    between stages.

    Args:
        modules: canonical name in the whole model -> module, in order of use.
        embedding, norm, head: names, or None where the stage lacks them; layers: names in order.
        rotary: positions -> cosine and sine; real buffers, no parameters.
        autocast: run in `compute_dtype` though the weights are float32 (full fine-tuning).
        recompute: keep only each layer's input for the backward pass.
        seeded: set the random state before each layer, for dropout that is the same in any layout.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        *,
        embedding: str | None,
        layers: list[str],
        norm: str | None,
        head: str | None,
        rotary: nn.Module,
        compute_dtype: torch.dtype,
        autocast: bool,
        recompute: bool,
        seeded: bool,
    ) -> None:
        super().__init__()
        self.names = dict(modules)
        self.parts = nn.ModuleList(modules.values())
        self.embedding = modules[embedding] if embedding else None
        self.layers = [modules[name] for name in layers]
        self.layer_names = layers
        self.norm = modules[norm] if norm else None
        self.head = modules[head] if head else None
        self.rotary = rotary
        self.compute_dtype = compute_dtype
        self.autocast = autocast
        self.recompute = recompute
        self.seeded = seeded

    def canonical_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by their name in the whole model, in model order."""
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.names.items()
            for name, parameter in module.named_parameters()
        }

    def forward(self, inputs: Tensor, micro_batch: MicroBatch) -> Tensor | LossOutput:
        """Token ids [b, s] or hidden states in; hidden states, or losses on the last stage, out."""
        device = inputs.device
        mask = document_mask(micro_batch.document_lengths, device)
        positions = position_ids(micro_batch.document_lengths).to(device)
        hidden = inputs
        with torch.autocast(device.type, self.compute_dtype, enabled=self.autocast):
            if self.embedding is not None:
                hidden = self.embedding(inputs).to(self.compute_dtype)
            rotary = self.rotary(hidden, positions)
            for name, layer in zip(self.layer_names, self.layers, strict=True):
                run = self._layer_runner(layer, name, mask, positions, rotary, micro_batch.seed)
                if self.recompute and self.training:
                    hidden = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
                else:
                    hidden = run(hidden)
            if self.norm is not None:
                hidden = self.norm(hidden)
        if self.head is None:
            return hidden
        return self._loss(hidden, micro_batch)

    def _layer_runner(
        self,
        layer: nn.Module,
        name: str,
        mask: Tensor | None,
        positions: Tensor,
        rotary: tuple[Tensor, Tensor],
        seed: int,
    ) -> Callable[[Tensor], Tensor]:
        def run(hidden: Tensor) -> Tensor:
            if self.seeded and self.training:
                torch.manual_seed(derive_seed(seed, name))
            output: Tensor = layer(
                hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary
            )
            return output

        return run

    def _loss(self, hidden: Tensor, micro_batch: MicroBatch) -> LossOutput:
        assert isinstance(self.head, nn.Linear) and micro_batch.labels is not None
        labels = micro_batch.labels
        loss, token_losses = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]).to(self.compute_dtype),
            self.head.weight.to(self.compute_dtype),
            labels.reshape(-1),
            micro_batch.loss_scale,
        )
        return LossOutput(loss, token_losses.view(labels.shape))
