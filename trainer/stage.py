"""One pipeline stage: decoder layers, the embedding before the first, the head after the last."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headrace.kernels.linear_cross_entropy import linear_cross_entropy
from headrace.schemas.fingerprint import derive_seed
from headrace.trainer.batch import document_mask, position_ids, to_device
from headrace.trainer.document_attention import KEYWORD, document_bounds
from headrace.trainer.layer_functions import LayerFunctions, run_layer, run_layer_again


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

    Attributes:
        layer_functions: how a layer is run.
        before_step: to be called before the micro-batches of a step, with none in flight.
        by_bounds: attention takes the documents' bounds instead of a mask.
        triton: the loss is computed in Triton.
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
        self.layer_functions = LayerFunctions(run_layer, run_layer_again)
        self.before_step: Callable[[], None] | None = None
        self.by_bounds = False
        self.triton = False

    def canonical_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by their name in the whole model, in model order."""
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.names.items()
            for name, parameter in module.named_parameters()
        }

    def forward(self, inputs: Tensor, micro_batch: MicroBatch) -> Tensor | LossOutput:
        """Token ids [b, s] or hidden states in; hidden states, or losses on the last stage, out."""
        hidden = inputs
        with torch.autocast(inputs.device.type, self.compute_dtype, enabled=self.autocast):
            if self.embedding is not None:
                hidden = self.embedding(inputs).to(self.compute_dtype)
            arguments = self._layer_arguments(hidden, micro_batch.document_lengths)
            for name, layer in zip(self.layer_names, self.layers, strict=True):
                hidden = self._run_layer(
                    layer, hidden, arguments, derive_seed(micro_batch.seed, name)
                )
            if self.norm is not None:
                hidden = self.norm(hidden)
        if self.head is None:
            return hidden
        return self._loss(hidden, micro_batch)

    def _layer_arguments(self, hidden: Tensor, document_lengths: list[list[int]]) -> dict[str, Any]:
        """What all layers are given beside the hidden states; made once for a micro-batch."""
        device = hidden.device
        positions = to_device(position_ids(document_lengths), device)
        arguments = {
            "position_ids": positions,
            "position_embeddings": self.rotary(hidden, positions),
            "attention_mask": None,
        }
        if self.by_bounds:
            arguments[KEYWORD] = document_bounds(document_lengths, device)
        else:
            arguments["attention_mask"] = document_mask(document_lengths, device)
        return arguments

    def _run_layer(
        self, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], seed: int
    ) -> Tensor:
        recompute = self.recompute and self.training
        if not (self.seeded and self.training):
            function = self.layer_functions.again if recompute else self.layer_functions.once
            return function(layer, hidden, arguments)
        run = partial(self._run_seeded, layer, arguments=arguments, seed=seed)
        if not recompute:
            return run(hidden)
        # the second run sets the random state as the first did, so no state is kept
        output: Tensor = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
        return output

    def _run_seeded(
        self, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], seed: int
    ) -> Tensor:
        torch.manual_seed(seed)
        return self.layer_functions.once(layer, hidden, arguments)

    def _loss(self, hidden: Tensor, micro_batch: MicroBatch) -> LossOutput:
        assert isinstance(self.head, nn.Linear) and micro_batch.labels is not None
        labels = micro_batch.labels
        loss, token_losses = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]).to(self.compute_dtype),
            self.head.weight.to(self.compute_dtype),
            labels.reshape(-1),
            micro_batch.loss_scale,
            triton=self.triton,
        )
        return LossOutput(loss, token_losses.view(labels.shape))
