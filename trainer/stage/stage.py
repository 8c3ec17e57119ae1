"""One pipeline stage: decoder layers, the embedding before the first, the head after the last."""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from headrace.kernels.token_statistics import TokenStatistics
from headrace.schemas.fingerprint import derive_seed
from headrace.trainer.adapters.names import CONTROL
from headrace.trainer.families.attention import all_chosen, is_indexed
from headrace.trainer.layers.attention_mask import attention_masks
from headrace.trainer.layers.device import position_ids, to_device
from headrace.trainer.layers.document_attention import VisibleTokens, visible_tokens
from headrace.trainer.layers.documents import Documents, find_documents
from headrace.trainer.layers.layer_arguments import LayerArguments
from headrace.trainer.layers.rotary_tables import rotary_tables
from headrace.trainer.layers.router_loss import (
    balance_loss,
    balance_parts,
    real_tokens,
    tap_router,
    total_loss,
)
from headrace.trainer.layers.selective_checkpoint import kept_products, layer_functions
from headrace.trainer.row_slice import RowSlice
from headrace.trainer.stage.companion import joined, parted
from headrace.trainer.stage.distance_biases import DistanceBiases
from headrace.trainer.stage.embedding import StageEmbedding
from headrace.trainer.stage.loss import LossInputs, StageLoss
from headrace.trainer.stage.micro_batch import MicroBatch, StageOutput
from headrace.trainer.stage.sliced_attention import keys_in_use
from headrace.trainer.stage.spec import StageSpec
from headrace.trainer.stage.stream import Carried
from headrace.trainer.vision.features import Features
from headrace.trainer.vision.inputs import VisionInputs

NOTHING: dict[str, Any] = {}
Masks = Mapping[int | None, Tensor | VisibleTokens | None]  # by window


class Stage(nn.Module):
    """The modules of one stage under the names that they have in the whole (PEFT-wrapped) model.

    Hidden states of one fixed shape, [b, s, hidden size] in `hidden_dtype`, are all that passes
    between stages. Where ranks share rows, s is what each of them holds.

    Args:
        reference: the same layers as they were before training, for objectives that compare with
            them, or a stage of a teacher. Hidden states for both travel as one tensor.
    """

    def __init__(self, spec: StageSpec, reference: "Stage | None" = None) -> None:
        super().__init__()
        modules, names, faster = spec.modules, spec.names, spec.acceleration
        architecture, layers = spec.architecture, spec.layers
        self.sequence = spec.sequence
        self.names = dict(modules)
        self.parts = nn.ModuleList(spec.moved)
        self.embedding, self.loss = embedding_of(spec), loss_of(spec)
        self.layers = spec.layer_modules
        self.layer_names = names.layers
        self.norm = modules[names.norm] if names.norm and faster.norm is None else faster.norm
        output = architecture.family.ends.output
        self.output = modules[names.prefix + output] if names.head and output else None
        self.stream = spec.stream
        self.rotary = spec.rotary
        self.windows = [architecture.windows[index] for index in layers]
        self.rotary_types = [architecture.rotary_types[index] for index in layers]
        self.rotary_by_document = architecture.rotary_by_document
        self.stateful = [architecture.stateful[index] for index in layers]
        self.attends = [architecture.attends[index] for index in layers]
        self.states = architecture.family.states
        self.numbers = list(layers)
        self.tower = spec.tower
        self.additive_mask = architecture.attention == "eager" or architecture.alibi is not None
        self.indexed = is_indexed(architecture.config)
        self.biases: DistanceBiases | None = None
        if architecture.alibi is not None:
            self.biases = DistanceBiases(
                architecture.alibi, architecture.config, spec.compute_dtype
            )
        self.router_loss = spec.router_loss
        self.taps = [tap_router(layer, spec.router_loss) for layer in self.layers]
        self.layer_arguments = [LayerArguments(layer) for layer in self.layers]
        self.compute_dtype = spec.compute_dtype
        self.hidden_dtype = torch.float32 if architecture.keeps_float32 else self.compute_dtype
        self.autocast = spec.autocast
        self.recomputed = spec.recomputed
        self.offload = spec.offload
        self.seeded = spec.seeded
        self.weight_offload = spec.weight_offload
        self.selective = spec.selective
        self.kept_attention = spec.kept_attention
        self.uncompiled = layer_functions(selective=spec.selective)
        self.layer_functions = faster.layer_functions or self.uncompiled
        # For layers with a state, whose code goes by documents' lengths, and for selective
        # recomputation from outside, which keeps results that compiled code writes over
        self.before_step = faster.before_step
        self.by_bounds, self.in_blocks = faster.by_bounds, faster.in_blocks
        self.by_rows = faster.by_rows
        self.objective = spec.objective
        self.controls = [getattr(layer, CONTROL, None) for layer in self.layers]
        self.keys_in_use = [keys_in_use(layer) for layer in self.layers]
        self.reference = reference
        self.width = architecture.stream.width

    @property
    def device(self) -> torch.device:
        """Return the device of the layers; the embedding may be elsewhere."""
        if not self.layers:  # the stage of a vision tower
            return next(self.parts[-1].parameters()).device
        return next(self.layers[0].parameters()).device

    def train(self, mode: bool = True) -> "Stage":
        """Set the mode of all modules; the reference stays in evaluation mode."""
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
            own, before = inputs, inputs
            if self.embedding is None:
                own, before = parted(inputs, self.width, wide=self.objective.takes_teacher)
            with torch.no_grad():
                reference, _ = self.reference.run(before, micro_batch)
        hidden, parts = self.run(own, micro_batch)
        router_loss = None
        if micro_batch.rows.is_whole:
            losses, parts = [balance_loss(part, self.sequence) for part in parts], []
            router_loss = total_loss(losses, self.router_loss, micro_batch.router_scale)
        if self.loss is None:
            value = hidden
            if reference is not None:
                value = joined(hidden, reference, wide=self.objective.takes_teacher)
            return StageOutput(value, router_loss=router_loss, router_parts=parts)
        output = self._losses(self.loss, hidden, reference, micro_batch)
        if micro_batch.wants_statistics:
            norms = torch.linalg.vector_norm(hidden.detach(), dim=-1, dtype=torch.float32)
            output = replace(output, hidden_norms=norms)
        if router_loss is None:
            return replace(output, router_parts=parts)
        return replace(output, value=output.value + router_loss, router_loss=router_loss)

    def run(self, inputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, list[Tensor]]:
        """Return hidden states after the last layer, or after the norm, and each router's
        `balance_parts`.
        """
        device, rows = self.device, micro_batch.rows
        lengths = micro_batch.document_lengths
        vision = micro_batch.extras.vision
        states = None
        if any(self.stateful):
            states = find_documents(lengths, micro_batch.row_lengths, device)
        every_position = to_device(position_ids(lengths), device)
        positions = self.sequence.share(rows.share(every_position))
        groups = None if vision is None else vision.groups
        keys = positions if rows.is_whole else every_position[:, : rows.bounds(sum(lengths[0]))[1]]
        masks = self._masks(lengths, self.attention_windows, device, groups, rows)
        masks, further = self.with_masks(masks, keys, max(map(max, lengths)))
        real = None
        if self.router_loss is not None:
            counted = micro_batch.extras.counted(micro_batch.row_lengths)
            real = real_tokens(counted, sum(lengths[0]), device)
            real = self.sequence.share(rows.share(real)).flatten()
        router_parts = []
        with torch.autocast(device.type, self.compute_dtype, enabled=self.autocast):
            features = self._features(vision, micro_batch.seed)
            if self.embedding is not None:
                chance = micro_batch if self.training else None
                embedded = self.embedding.embed(inputs, positions, chance, device, features)
                hidden, carried = self.stream.begin(embedded, inputs, features)
            else:
                hidden, carried = self.stream.split(inputs)
            axes = every_position
            if vision is not None and vision.positions is not None:
                axes = vision.positions.long()
            tables = self._rotary_tables(hidden, axes, lengths, rows)
            for kept in (self.offload, self.kept_attention):
                if kept is not None:
                    kept.begin()
            for index in range(len(self.layers)):
                window = self.windows[index]
                table = tables.get(self.rotary_types[index])
                mask = masks.get(window)
                beside = further | carried.arguments(self.numbers[index])
                arguments = self.arguments_of_layer(index, mask, positions, table, states, beside)
                run = self._layer_runner(index, arguments, real, micro_batch)
                with self._kept(index, hidden):
                    hidden, parts = run(hidden)
                carried.take(self.numbers[index], arguments)
                hidden = carried.added(self.numbers[index], hidden)
                if features is not None and carried.stacked is None:
                    hidden = features.add(hidden, self.numbers[index])
                hidden = hidden.to(self.hidden_dtype)  # autocast may leave a norm's float32
                router_parts += [] if parts is None else [parts]
            hidden = self.ended(hidden, carried)
        return hidden, router_parts

    def _features(self, vision: VisionInputs | None, seed: int) -> Features | None:
        """Return the features of a micro-batch's pictures, where the tower is and there are any."""
        if self.tower is None or vision is None or vision.places is None:
            return None
        seeds = derive_seed(seed, "vision") if self.seeded and self.training else None
        return self.tower.features(vision.arguments, vision.places, seeds)

    def ended(self, hidden: Tensor, carried: Carried) -> Tensor:
        """Return what the head or the next stage is given, of what the last layer gives."""
        if self.loss is None:
            return self.stream.join(hidden, carried)
        hidden = self.stream.end(hidden)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return hidden if self.output is None else self.output(hidden)

    def _rotary_tables(
        self, hidden: Tensor, positions: Tensor, lengths: list[list[int]], rows: RowSlice
    ) -> dict[str | None, Any]:
        """Return cosines and sines of the tokens that are here.

        Args:
            positions: of whole rows, whose documents may decide the frequencies.
        """
        if not self.rotary_by_document:
            positions = self.sequence.share(rows.share(positions))
            return rotary_tables(self.rotary, self.rotary_types, hidden, positions, None)
        tables = rotary_tables(self.rotary, self.rotary_types, hidden, positions, lengths)
        return {
            kind: tuple(self.sequence.share(rows.share(table)) for table in pair)
            for kind, pair in tables.items()
        }

    @property
    def attention_windows(self) -> list[int | None]:
        """Return the windows of those layers that attend."""
        pairs = zip(self.windows, self.attends, strict=True)
        return [window for window, attends in pairs if attends]

    def with_masks(
        self, masks: Masks, positions: Tensor, longest: int
    ) -> tuple[Masks, dict[str, Any]]:
        """Return masks as the family's layers want them, and what else these are given.

        Args:
            positions: [b, s] in documents, of all that may be attended to.
            longest: tokens of the longest document.
        """
        if self.indexed:
            return masks, all_chosen(positions)
        if self.biases is None:
            return masks, NOTHING
        biases = self.biases.of_rows(positions, longest)
        return self.biases.masks(masks, biases), self.biases.arguments(biases)

    def _masks(
        self,
        lengths: list[list[int]],
        windows: list[int | None],
        device: torch.device,
        groups: Tensor | None,
        rows: RowSlice,
    ) -> Masks:
        """Return what a layer's attention is given, by its window."""
        if self.by_bounds:
            kernels = {"in_blocks": self.in_blocks, "by_rows": self.by_rows}
            return visible_tokens(lengths, windows, device, groups=groups, rows=rows, **kernels)
        additive = self.compute_dtype if self.additive_mask else None
        return attention_masks(
            lengths, windows, device, additive, groups, rows, always=self.indexed
        )

    def _kept(self, index: int, hidden: Tensor) -> AbstractContextManager[None]:
        """Return the context that stores a layer's saved tensors, unless autograd holds them."""
        if self.recomputed[index]:
            return contextlib.nullcontext() if self.offload is None else self.offload.of(hidden)
        weights = self.weight_offload
        return contextlib.nullcontext() if weights is None else weights.of(index)

    def arguments_of_layer(
        self,
        index: int,
        mask: Tensor | VisibleTokens | None,
        positions: Tensor,
        rotary: Any,
        states: Documents | Tensor | None = None,
        further: dict[str, Any] = NOTHING,
    ) -> dict[str, Any]:
        """Return a layer's arguments beside the hidden states.

        Args:
            states: what a layer with a state is given for a mask of it.
            further: what else the layers of a family are given.
        """
        arguments = {"attention_mask": mask, "position_ids": positions, **further}
        if rotary is not None:
            arguments["position_embeddings"] = rotary
        if self.states is not None and self.stateful[index]:
            arguments[self.states.mask] = states
        return self.layer_arguments[index].select(arguments)

    def _layer_runner(
        self, index: int, arguments: dict[str, Any], real: Tensor | None, micro_batch: MicroBatch
    ) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """A function for one layer: hidden states in, these and its router's parts out."""
        layer, name, tap = self.layers[index], self.layer_names[index], self.taps[index]
        control, classes = self.controls[index], micro_batch.extras.control_classes
        assert control is None or classes is not None
        seed, rows, joins = micro_batch.seed, micro_batch.rows, self.keys_in_use[index]
        kept = None if rows.kept is None or joins is None else rows.kept.layers[index]
        places = sum(micro_batch.document_lengths[0])
        tokens = sum(micro_batch.extras.counted(micro_batch.row_lengths))
        seeded, recompute = self.seeded and self.training, self.recomputed[index] and self.training
        routes = tap is not None and real is not None and self.router_loss is not None
        weights = self.weight_offload
        beside = (control, weights, kept, self.kept_attention)
        outside = recompute and (seeded or routes or any(part is not None for part in beside))
        within = recompute and not outside
        keeps = self.selective or self.kept_attention is not None
        as_it_is = self.stateful[index] or bool(self.stream.modes) or (outside and keeps)
        functions = self.uncompiled if as_it_is else self.layer_functions
        function = functions.checkpointed if within else functions.plain

        def run(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
            if seeded:
                torch.manual_seed(derive_seed(seed, name))
            if weights is not None:
                weights.bring(index)
            sliced: AbstractContextManager[None] = contextlib.nullcontext()
            if joins is not None and kept is not None:
                sliced = joins.of(kept, rows.bounds(places)[0], places)
            with sliced:
                states = function(layer, hidden, arguments)
            if control is not None:
                states = control(hidden, states, classes)
            if tap is None or real is None or self.router_loss is None:
                return states, None
            top_k = self.router_loss.top_k
            return states, balance_parts(tap.take(), top_k, real, tokens)

        if outside:
            contexts = kept_products if self.selective else noop_context_fn
            if self.kept_attention is not None:
                contexts = self.kept_attention.contexts
            return partial(
                checkpoint,
                run,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=contexts,
            )
        return run

    def _losses(
        self, loss: StageLoss, hidden: Tensor, reference: Tensor | None, micro_batch: MicroBatch
    ) -> StageOutput:
        seed = None
        if self.seeded and self.training:
            seed = derive_seed(micro_batch.seed, "head")
        statistics = None
        if micro_batch.wants_statistics:
            statistics = TokenStatistics.empty(hidden[..., 0].numel(), hidden.device)
        assert micro_batch.labels is not None
        inputs = LossInputs(
            head=loss,
            hidden=hidden,
            micro_batch=micro_batch,
            labels=micro_batch.labels,
            seed=seed,
            statistics=statistics,
        )
        if reference is not None:
            assert self.reference is not None and self.reference.loss is not None
            other = self.reference.loss
            if self.objective.takes_teacher:
                return self.objective.loss(replace(inputs, teacher=other, taught=reference))
            with torch.no_grad():
                before = other.token_losses(reference, micro_batch.labels, None)
            inputs = replace(inputs, before=before)
        return self.objective.loss(inputs)


def embedding_of(spec: StageSpec) -> StageEmbedding | None:
    """Return the embedding of a stage that has it."""
    if not spec.names.embedding:
        return None
    return StageEmbedding(
        spec.modules[spec.names.embedding],
        spec.input_parts,
        spec.architecture,
        spec.compute_dtype,
        seeded=spec.seeded,
        noise_alpha=spec.noise_alpha,
        shard=spec.cuts.shard,
    )


def loss_of(spec: StageSpec) -> StageLoss | None:
    """Return the head of a stage that has it."""
    if not spec.names.head:
        return None
    return StageLoss(
        spec.modules[spec.names.head],
        spec.architecture,
        spec.compute_dtype,
        autocast=spec.autocast,
        triton=spec.acceleration.triton_loss,
        sequence=spec.sequence,
        shard=spec.cuts.shard,
    )
