"""DeepSpeed's pipeline engine, with our inputs, losses and gradients; the step is the loop's.

Kept of DeepSpeed: the 1F1B schedule, the process grid, and the transfer of hidden states and their
gradients between stages. This is the only file that touches its private parts; read against
DeepSpeed 0.19.8.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import deepspeed
import torch
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.ops import __compatible_ops__ as compatible_operators
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import Tensor, nn

from headrace.schemas.fingerprint import derive_seed
from headrace.schemas.train.data_config import BatchConfig
from headrace.trainer import devices
from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.layers.device import to_device
from headrace.trainer.metrics.step_losses import StepLosses
from headrace.trainer.parallel import RankLayout
from headrace.trainer.pipeline.timeline import Timeline
from headrace.trainer.row_slice import WHOLE_ROWS, RowSlice
from headrace.trainer.stage.micro_batch import MicroBatch, StageOutput
from headrace.trainer.stage.stage import Stage


@dataclass(frozen=True)
class ForwardOutput:
    """Tensors of a forward pass whose gradients the backward pass needs."""

    value: Tensor  # hidden states, or on the last stage the loss
    router_loss: Tensor | None  # that is not in the value yet
    router_parts: Sequence[Tensor] = ()  # of a slice of rows, what its routers' loss is made of

    def backward(self, gradient: Tensor | None) -> None:
        """Add to the gradients of inputs and weights; the first stages may train nothing.

        Args:
            gradient: of the hidden states.
        """
        roots, gradients = [self.value], [gradient]
        if self.router_loss is not None:
            roots, gradients = [*roots, self.router_loss], [*gradients, None]
        go_back(roots, gradients)


def go_back(roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add to the gradients of what leads to the roots, of those that are trained."""
    trained = [root.requires_grad for root in roots]
    if any(trained):
        torch.autograd.backward(list(compress(roots, trained)), list(compress(gradients, trained)))


def _nothing(engine: PipelineEngine) -> None:
    """Leave to the loop what follows the backward passes: reducing gradients, and the step."""


class StageEngine(PipelineEngine):
    """Runs steps of one stage in concert with the other stages.

    Args:
        chunks: of the model, that this stage holds; DeepSpeed's schedules take a single one.

    Attributes:
        timeline: of the instructions, if `profile.timeline` is set.
    """

    def __init__(
        self,
        chunks: Sequence[Stage],
        config: BatchConfig,
        layout: RankLayout,
        *,
        timed: bool = False,
    ) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._join_process_group(layout)
        settings = {
            "train_micro_batch_size_per_gpu": config.micro_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "zero_optimization": {"stage": 0},
            "steps_per_print": None,
            "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        }
        with contextlib.redirect_stdout(io.StringIO()):
            module = _as_pipeline_module(chunks, layout)
            grid = module.mpu()
            super().__init__(
                args=None,
                model=module,
                mpu=grid,
                config=settings,
                config_class=DeepSpeedConfig(settings, grid),
                dist_init_required=False,
            )
        self.chunks = list(chunks)
        self.layout = layout
        self.sequence = self.chunks[0].sequence
        self._inputs: StepInputs | None = None
        self._next_micro_batch = 0
        self._step_seed = 0
        self._wants_statistics = False
        self._loss_scale = 1.0
        self.timeline = Timeline(layout.device, wanted=timed)
        if timed:
            self._INSTRUCTION_MAP = {
                kind: self.timeline.timed(kind.__name__, run) if run is not _nothing else run
                for kind, run in self._INSTRUCTION_MAP.items()
            }
        self._outputs: list[StageOutput] = []  # last stage, one of each micro-batch
        self._router_losses: list[Tensor] = []  # stages with routers, one of each micro-batch
        self._forward_outputs: dict[
            int, ForwardOutput
        ] = {}  # buffer -> what its last forward pass has made

    @staticmethod
    def _join_process_group(layout: RankLayout) -> None:
        """Let DeepSpeed use the process group that exists.

        On CPU it would compile, and reduce through, a shared-memory operator whose segments outlive
        a killed process; gloo serves as well.
        """
        compatible_operators["deepspeed_shm_comm"] = False
        backend = devices.COLLECTIVES[layout.device.type]
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        assert deepspeed_comm.is_initialized()

    def forward_backward(
        self, inputs: StepInputs, seed: int, *, statistics: bool = False, scale: float = 1.0
    ) -> StepLosses:
        """Run all micro-batches forward and backward; gradients add to those that are there.

        Args:
            seed: of dropout in this step.
            statistics: take those of each token too.
            scale: of gradients; losses are returned without it.
        """
        self.module.train()
        self._loss_scale = scale
        return self._run(inputs, seed, trains=True, statistics=statistics)

    def forward_only(self, inputs: StepInputs) -> StepLosses:
        """Run all micro-batches forward, without dropout and with statistics of each token."""
        self.module.eval()
        self._loss_scale = 1.0
        with torch.no_grad():
            return self._run(inputs, 0, trains=False, statistics=True)

    def _run(self, inputs: StepInputs, seed: int, *, trains: bool, statistics: bool) -> StepLosses:
        for chunk in self.chunks:
            if chunk.before_step is not None:
                chunk.before_step()
        self._inputs, self._step_seed, self._wants_statistics = inputs, seed, statistics
        self._outputs, self._router_losses = [], []
        self._execute(inputs.micro_batches, trains=trains)
        slices = self._slices(trains=trains)
        return StepLosses(self.chunks, inputs, self._outputs, self._router_losses, slices)

    def _slices(self, *, trains: bool) -> int:
        """Return in how many slices rows go through the stages."""
        return 1

    def _execute(self, micro_batches: int, *, trains: bool) -> None:
        """Carry out a schedule, here one of DeepSpeed's."""
        kind = schedule.TrainSchedule if trains else schedule.InferenceSchedule
        self._next_micro_batch = 0
        self._forward_outputs.clear()
        self._exec_schedule(kind(micro_batches, self.num_stages, self.stage_id))

    def _token_ids(self, index: int, rows: RowSlice = WHOLE_ROWS) -> Tensor:
        """[b, s] of a micro-batch, where the embedding is; first stage only."""
        embedding = self.chunks[0].embedding
        assert self._inputs is not None and self._inputs.input_ids is not None
        assert embedding is not None
        ids = self.sequence.share(rows.share(self._inputs.input_ids[index]))
        return to_device(ids, embedding.device).long()

    def _forward(
        self, chunk: Stage, hidden: Tensor, index: int, rows: RowSlice = WHOLE_ROWS
    ) -> ForwardOutput:
        """Run a micro-batch through a chunk, and keep its losses."""
        is_last = chunk.loss is not None
        output: StageOutput = chunk(hidden, self._micro_batch(index, rows, labeled=is_last))
        if output.token_losses is not None:
            value = output.value.detach() / self._loss_scale
            self._outputs.append(replace(output, value=value, router_loss=None, router_parts=[]))
        router_loss = output.router_loss
        if router_loss is not None:
            self._router_losses.append(router_loss.detach() / self._loss_scale)
        return ForwardOutput(output.value, None if is_last else router_loss, output.router_parts)

    def _micro_batch(self, index: int, rows: RowSlice, *, labeled: bool) -> MicroBatch:
        inputs = self._inputs
        assert inputs is not None
        labels = None
        if labeled and inputs.labels is not None:
            mine = self.sequence.share(rows.share(inputs.labels[index]))
            labels = to_device(mine, self.device).long()
        return MicroBatch(
            document_lengths=inputs.document_lengths[index],
            row_lengths=inputs.row_lengths[index],
            labels=labels,
            loss_scale=self._loss_scale / max(1, inputs.pair_count or inputs.trained_tokens),
            router_scale=self._router_scale(index),
            seed=self._seed(index, rows),
            extras=inputs.extras[index].to(self.device, self.sequence, rows),
            chosen_scale=self._loss_scale / max(1, inputs.chosen_tokens),
            wants_statistics=self._wants_statistics,
            rows=rows,
        )

    def _router_scale(self, index: int) -> float:
        """Return the share of a micro-batch's tokens in those of the global batch, scaled."""
        assert self._inputs is not None
        counted = self._inputs.extras[index].counted(self._inputs.row_lengths[index])
        return self._loss_scale * sum(counted) / max(1, self._inputs.tokens)

    def _seed(self, index: int, rows: RowSlice) -> int:
        """Return the seed of a micro-batch's dropout, of each slice of rows another."""
        seed = self._step_seed + self.layout.global_micro_batch(index)
        number = rows.number * self.sequence.ranks + self.sequence.rank
        return derive_seed(seed, "slice", number) if number else seed

    # --- instructions of DeepSpeed's schedules ---

    def _load_micro_batch(self, buffer_id: int) -> None:
        """First stage: the token ids of the next micro-batch. The last has its labels already."""
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = self._token_ids(self._next_micro_batch)

    def _forward_pass(self, buffer_id: int) -> None:
        (chunk,) = self.chunks
        hidden = self.pipe_buffers["inputs"][buffer_id]
        output = self._forward(chunk, hidden, self._next_micro_batch)
        self._next_micro_batch += 1
        self._forward_outputs[buffer_id] = output
        self.pipe_buffers["outputs"][buffer_id] = output.value

    def _backward_pass(self, buffer_id: int) -> None:
        gradient = None if self.is_last_stage() else self.grad_layer
        self._forward_outputs.pop(buffer_id).backward(gradient)
        self.pipe_buffers["outputs"][buffer_id] = None
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = None

    def _broadcast_model(self) -> None:
        """Every replica loads or initializes the same weights by itself."""

    _INSTRUCTION_MAP: dict[type, Callable[..., None]] = {  # noqa: RUF012 (DeepSpeed's)
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.LoadMicroBatch: _load_micro_batch,
        schedule.ForwardPass: _forward_pass,
        schedule.BackwardPass: _backward_pass,
        schedule.ReduceTiedGrads: _nothing,
        schedule.ReduceGrads: _nothing,
        schedule.OptimizerStep: _nothing,
    }


def _as_pipeline_module(chunks: Sequence[Stage], layout: RankLayout) -> PipelineModule:
    """Wrap the chunks as one DeepSpeed layer, so that cutting, placing and running stays ours."""
    places: list[nn.Module | None] = [None] * layout.stages
    places[layout.stage] = nn.ModuleList(chunks)
    # DeepSpeed knows three; sequence and tensor, the innermost, are one to it
    names = {"replica": "data", "stage": "pipe"}
    axes = {names[axis]: size for axis, size in layout.dims.axes.items() if axis in names}
    axes["model"] = layout.dims.sequence * layout.dims.tensor
    topology = ProcessTopology(axes=list(axes), dims=list(axes.values()))
    return PipelineModule(layers=places, topology=topology, partition_method="uniform")
