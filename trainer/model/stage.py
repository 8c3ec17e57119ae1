"""One pipeline stage: decoder layers, the embedding before the first, the head after the last."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from headrace.kernels.linear_cross_entropy import IGNORED_LABEL
from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.objective_config import ObjectiveConfig
from headrace.trainer.data.batch import position_ids, to_device
from headrace.trainer.model.activation_offload import ActivationOffload
from headrace.trainer.model.architecture import Architecture
from headrace.trainer.model.attention_mask import attention_masks
from headrace.trainer.model.control_adapter import CONTROL
from headrace.trainer.model.document_attention import KEYWORD, document_bounds
from headrace.trainer.model.embedding_noise import embedding_noise
from headrace.trainer.model.head_loss import (
    LogitShape,
    head_loss,
    head_token_losses,
    is_plain,
)
from headrace.trainer.model.layer_functions import LayerFunctions, run_layer, run_layer_again
from headrace.trainer.model.pair_objectives import PairLosses, pair_losses, sum_answers
from headrace.trainer.model.router_loss import RouterLossSettings, RouterTap, balance_loss
from headrace.trainer.model.token_objectives import adjusted_losses, logit_factor


@dataclass(frozen=True)
class MicroBatch:
    """What a stage needs beside the hidden states. b rows of s tokens."""

    document_lengths: list[list[int]]  # [b]
    row_lengths: list[int]  # [b] tokens of each row, filling left out
    labels: Tensor | None  # [b, s] int64, last stage only
    loss_scale: float  # 1 / trained tokens of the global batch, or 1 / its pairs
    router_scale: float  # tokens of this micro-batch / tokens of the global batch
    seed: int  # of this micro-batch's dropout
    pairs: list[list[tuple[int, int]]] | None = None  # [b/2] tokens of both sides; last stage only
    chosen_scale: float = 0.0  # 1 / trained tokens of all chosen answers
    control_classes: Tensor | None = None  # [b, s] int8: -1, 0, 1; control adapters only


@dataclass(frozen=True)
class StageOutput:
    """What a stage returns.

    `router_loss` is this stage's part of the routers' loss; on the last stage `value` holds it
    already, on others it is to be differentiated beside the hidden states.
    """

    value: Tensor  # hidden states for the next stage, or the loss: the scalar to differentiate
    token_losses: Tensor | None = None  # last stage: [b, s] cross-entropy, float32, detached
    adjusted_losses: Tensor | None = None  # what is minimised in its place, likewise
    pairs: PairLosses | None = None  # last stage, objectives of pairs; detached
    router_loss: Tensor | None = None  # stages with routers: scalar, scaled as it enters the loss


@dataclass(frozen=True)
class StageNames:
    """Names of a stage's modules in the whole (PEFT-wrapped) model, in order of use."""

    embedding: str | None
    layers: list[str]
    norm: str | None
    head: str | None


class Stage(nn.Module):
    """The modules of one stage under the names that they have in the whole (PEFT-wrapped) model.

    Hidden states of one fixed shape, [b, s, hidden size] in the compute type, are all that passes
    between stages.

    Args:
        modules: canonical name in the whole model -> module, in order of use.
        names: which of them is what.
        layers: their numbers in the whole model.
        rotary: positions -> cosine and sine, real buffers, no parameters; None for models without.
        autocast: run in `compute_dtype` though the weights are float32 (full fine-tuning).
        recompute: numbers of the layers that keep only their input for the backward pass.
        offload: where these inputs are held in between, if not on the device.
        seeded: set the random state before each layer, for dropout that is the same in any layout.

    Attributes:
        layer_functions: how a layer is run.
        before_step: to be called before the micro-batches of a step, with none in flight.
        by_bounds: attention without a window takes the documents' bounds instead of a mask.
        triton: the loss is computed in Triton.
        noise_alpha: of NEFTune's noise on embeddings, if any.
        objective: what the last stage computes.
        reference: the same layers as they were before training, for objectives that compare with
            them. Hidden states for both travel as one tensor, [2b, s, hidden size].
    """

    reference: "Stage | None"

    def __init__(
        self,
        modules: dict[str, nn.Module],
        *,
        names: StageNames,
        layers: Sequence[int],
        rotary: nn.Module | None,
        architecture: Architecture,
        router_loss: RouterLossSettings | None,
        compute_dtype: torch.dtype,
        autocast: bool,
        recompute: frozenset[int],
        offload: ActivationOffload | None,
        seeded: bool,
    ) -> None:
        super().__init__()
        self.names = dict(modules)
        self.parts = nn.ModuleList(modules.values())
        self.embedding = modules[names.embedding] if names.embedding else None
        self.layers = [modules[name] for name in names.layers]
        self.layer_names = names.layers
        self.norm = modules[names.norm] if names.norm else None
        self.head = modules[names.head] if names.head else None
        self.rotary = rotary
        self.windows = [architecture.windows[index] for index in layers]
        self.rotary_types = [architecture.rotary_types[index] for index in layers]
        self.rotary_by_document = architecture.rotary_by_document
        self.additive_mask = architecture.attention == "eager"
        family = architecture.family
        self.embedding_multiplier = architecture.setting(family.embedding_multiplier)
        self.embedding_dropout = architecture.setting(family.embedding_dropout, 0.0)
        divisor = architecture.setting(family.logit_divisor, 1.0) or 1.0
        multiplier = architecture.setting(family.logit_multiplier, 1.0) or 1.0
        self.logit_shape = LogitShape(
            multiplier / divisor, architecture.setting(family.logit_softcap)
        )
        self.router_loss = router_loss
        self.taps = [self._tap(layer) for layer in self.layers]
        self.layer_arguments = required_arguments(self.layers[0])
        self.compute_dtype = compute_dtype
        self.autocast = autocast
        self.recomputed = [index in recompute for index in layers]
        self.offload = offload
        self.seeded = seeded
        self.layer_functions = LayerFunctions(run_layer, run_layer_again)
        self.before_step: Callable[[], None] | None = None
        self.by_bounds = False
        self.triton = False
        self.noise_alpha: float | None = None
        self.objective = ObjectiveConfig()
        self.controls = [getattr(layer, CONTROL, None) for layer in self.layers]
        self.reference = None

    def train(self, mode: bool = True) -> "Stage":
        """As of all modules; the reference has no dropout."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def canonical_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by their name in the whole model, in model order."""
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.names.items()
            for name, parameter in module.named_parameters()
        }

    def forward(self, inputs: Tensor, micro_batch: MicroBatch) -> StageOutput:
        """Token ids [b, s] or hidden states in; hidden states, or losses on the last stage, out."""
        own, reference = inputs, None
        if self.reference is not None:
            own, before = (inputs, inputs) if self.embedding is not None else inputs.chunk(2)
            with torch.no_grad():
                reference, _ = self.reference.run(before, micro_batch)
        hidden, router_loss = self.run(own, micro_batch)
        if self.head is None:
            value = hidden if reference is None else torch.cat([hidden, reference])
            return StageOutput(value, router_loss=router_loss)
        output = self._loss(self.head, hidden, reference, micro_batch)
        if router_loss is None:
            return output
        return replace(output, value=output.value + router_loss, router_loss=router_loss)

    def run(self, inputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Hidden states after the last layer, or after the norm; the routers' part of the loss."""
        device = inputs.device
        additive = self.compute_dtype if self.additive_mask else None
        lengths = micro_batch.document_lengths
        bounds = document_bounds(lengths, device) if self.by_bounds else None
        masked = self.windows if not self.by_bounds else [w for w in self.windows if w is not None]
        masks = attention_masks(lengths, masked, device, additive) if masked else {}
        positions = to_device(position_ids(lengths), device)
        real = self._real_tokens(micro_batch, inputs)
        hidden, router_losses = inputs, []
        with self._precision():
            if self.embedding is not None:
                hidden = self._embed(inputs, micro_batch)
            tables = self._rotary_tables(hidden, positions, lengths)
            if self.offload is not None:
                self.offload.begin()
            for index in range(len(self.layers)):
                window = self.windows[index]
                table = tables.get(self.rotary_types[index])
                arguments = self.arguments_of_layer(masks.get(window), positions, table)
                if bounds is not None and window is None:
                    arguments[KEYWORD] = bounds
                run = self._layer_runner(index, arguments, real, micro_batch)
                if self.offload is not None and self.recomputed[index]:
                    with self.offload.of(hidden):
                        hidden, router_loss = run(hidden)
                else:
                    hidden, router_loss = run(hidden)
                router_losses += [] if router_loss is None else [router_loss]
            if self.norm is not None:
                hidden = self.norm(hidden)
        return hidden, self._total_router_loss(router_losses, micro_batch.router_scale)

    def _precision(self) -> AbstractContextManager[None]:
        device = next(self.parameters()).device
        return torch.autocast(device.type, self.compute_dtype, enabled=self.autocast)

    def _embed(self, ids: Tensor, micro_batch: MicroBatch) -> Tensor:
        assert self.embedding is not None
        seed = micro_batch.seed
        if self.seeded and self.training:
            torch.manual_seed(derive_seed(seed, "embedding"))
        hidden: Tensor = self.embedding(ids).to(self.compute_dtype)
        if self.noise_alpha is not None and self.training:
            lengths, seed = micro_batch.row_lengths, derive_seed(seed, "noise")
            hidden = hidden + embedding_noise(hidden, lengths, self.noise_alpha, seed)
        if self.embedding_multiplier is not None:
            hidden = hidden * self.embedding_multiplier
        if self.embedding_dropout:
            hidden = functional.dropout(hidden, self.embedding_dropout, training=self.training)
        return hidden

    def _rotary_tables(
        self, hidden: Tensor, positions: Tensor, document_lengths: list[list[int]]
    ) -> dict[str | None, Any]:
        """Cosine and sine for each kind of layer."""
        if self.rotary is None:
            return {}
        rotary = self.rotary

        def compute(kind: str | None, states: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
            table: tuple[Tensor, Tensor] = (
                rotary(states, at) if kind is None else rotary(states, at, kind)
            )
            return table

        def by_document(kind: str | None) -> tuple[Tensor, Tensor]:
            rows = []
            for row, lengths in enumerate(document_lengths):
                parts = zip(
                    hidden[row : row + 1].split(lengths, dim=1),
                    positions[row : row + 1].split(lengths, dim=1),
                    strict=True,
                )
                tables = [compute(kind, states, at) for states, at in parts]
                rows.append([torch.cat(kinds, dim=1) for kinds in zip(*tables, strict=True)])
            cosine, sine = (torch.cat(kinds) for kinds in zip(*rows, strict=True))
            return cosine, sine

        return {
            kind: by_document(kind) if self.rotary_by_document else compute(kind, hidden, positions)
            for kind in dict.fromkeys(self.rotary_types)
        }

    def arguments_of_layer(
        self, mask: Tensor | None, positions: Tensor, rotary: Any
    ) -> dict[str, Any]:
        """What a layer is given beside the hidden states."""
        arguments: dict[str, Any] = dict.fromkeys(self.layer_arguments)
        arguments |= {"attention_mask": mask, "position_ids": positions}
        if rotary is not None:
            arguments["position_embeddings"] = rotary
        return arguments

    def _layer_runner(
        self, index: int, arguments: dict[str, Any], real: Tensor | None, micro_batch: MicroBatch
    ) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """A function for one layer: hidden states in, hidden states and router loss out."""
        layer, name, tap = self.layers[index], self.layer_names[index], self.taps[index]
        control, classes = self.controls[index], micro_batch.control_classes
        assert control is None or classes is not None
        seed = micro_batch.seed
        seeded, recompute = self.seeded and self.training, self.recomputed[index] and self.training
        routes = tap is not None and real is not None and self.router_loss is not None
        outside = recompute and (seeded or routes or control is not None)
        within = recompute and not outside
        function = self.layer_functions.again if within else self.layer_functions.once

        def run(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
            if seeded:
                torch.manual_seed(derive_seed(seed, name))
            states = function(layer, hidden, arguments)
            if control is not None:
                states = control(hidden, states, classes)
            if tap is None or real is None or self.router_loss is None:
                return states, None
            return states, balance_loss(tap.take(), self.router_loss.top_k, real)

        if outside:
            return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        return run

    def _tap(self, layer: nn.Module) -> RouterTap | None:
        """A tap on the layer's router, if it has one whose loss is wanted."""
        if self.router_loss is None:
            return None
        router = self.router_loss.router
        has_one = any(isinstance(part, router.module_type) for part in layer.modules())
        return RouterTap(layer, router) if has_one else None

    def _real_tokens(self, micro_batch: MicroBatch, inputs: Tensor) -> Tensor | None:
        """[b * s] bool: false for filling. Only routers ask for it."""
        if self.router_loss is None:
            return None
        ends = torch.tensor(micro_batch.row_lengths).unsqueeze(1)
        return (torch.arange(inputs.shape[1]) < ends).flatten().to(inputs.device)

    def _total_router_loss(self, losses: list[Tensor], scale: float) -> Tensor | None:
        if not losses:
            return None
        assert self.router_loss is not None
        factor = self.router_loss.coefficient / self.router_loss.layers * scale
        return torch.stack(losses).sum() * factor

    def _loss(
        self, head: nn.Module, hidden: Tensor, reference: Tensor | None, micro_batch: MicroBatch
    ) -> StageOutput:
        labels, scale = micro_batch.labels, micro_batch.loss_scale
        assert labels is not None
        if self.objective.of_pairs:
            return self._pair_loss(head, hidden, reference, micro_batch)
        if self.objective.kind == "cross_entropy":
            arguments = (head, self._states(hidden), labels.reshape(-1), scale, self.logit_shape)
            if is_plain(head, self.logit_shape):
                loss, token_losses = head_loss(*arguments, triton=self.triton)
            else:
                with self._precision():
                    loss, token_losses = head_loss(*arguments, self._head_seed(micro_batch))
            return StageOutput(loss, token_losses.view(labels.shape))
        factor = logit_factor(self.objective)
        losses = self._token_losses(head, hidden, micro_batch, factor)
        adjusted = adjusted_losses(losses, self.objective)
        if factor != 1.0:
            with torch.no_grad():
                losses = self._token_losses(head, hidden, micro_batch)
        return StageOutput(adjusted.sum() * scale, losses.detach(), adjusted.detach())

    def _pair_loss(
        self, head: nn.Module, hidden: Tensor, reference: Tensor | None, micro_batch: MicroBatch
    ) -> StageOutput:
        assert micro_batch.labels is not None and micro_batch.pairs is not None
        losses, before = self._token_losses(head, hidden, micro_batch), None
        if reference is not None:
            assert self.reference is not None and self.reference.head is not None
            with torch.no_grad():
                before = self.reference._token_losses(self.reference.head, reference, micro_batch)
        trained = micro_batch.labels != IGNORED_LABEL
        answers = sum_answers(losses, before, trained, micro_batch.pairs)
        pairs = pair_losses(*answers, self.objective)
        chosen = losses[: len(micro_batch.pairs)].sum()  # a sum over no pairs has no gradient
        weight = self.objective.chosen_weight * micro_batch.chosen_scale
        loss = pairs.loss.sum() * micro_batch.loss_scale + chosen * weight
        return StageOutput(loss, losses.detach(), pairs=pairs.detach())

    def _token_losses(
        self, head: nn.Module, hidden: Tensor, micro_batch: MicroBatch, factor: float = 1.0
    ) -> Tensor:
        """[b, s] cross-entropy of so many times the logits, to be differentiated."""
        labels = micro_batch.labels
        assert labels is not None
        seed = self._head_seed(micro_batch)
        arguments = (head, self._states(hidden), labels.reshape(-1), self.logit_shape.times(factor))
        plain = is_plain(head, self.logit_shape)
        with contextlib.nullcontext() if plain else self._precision():
            losses = head_token_losses(*arguments, seed, triton=self.triton)
        return losses.view(labels.shape)

    def _states(self, hidden: Tensor) -> Tensor:
        return hidden.reshape(-1, hidden.shape[-1]).to(self.compute_dtype)

    def _head_seed(self, micro_batch: MicroBatch) -> int | None:
        return derive_seed(micro_batch.seed, "head") if self.seeded and self.training else None


def required_arguments(layer: nn.Module) -> list[str]:
    """Arguments that a layer insists on, such as falcon's alibi; None unless the stage has them."""
    parameters = list(inspect.signature(layer.forward).parameters.values())[1:]
    named = [part for part in parameters if part.kind is part.POSITIONAL_OR_KEYWORD]
    return [part.name for part in named if part.default is part.empty]
