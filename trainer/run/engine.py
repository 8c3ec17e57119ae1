"""DeepSpeed's pipeline engine, with our inputs, loss, gradients and optimiser step.

Kept of DeepSpeed: the 1F1B schedule, the process grid, and the transfer of hidden states and their
gradients between stages. This is the only file that touches its private parts; read against
DeepSpeed 0.19.8.
"""

import contextlib
import io
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import compress
from typing import Any

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

from headrace.schemas.train_config import TrainConfig
from headrace.trainer.data.batch import to_device
from headrace.trainer.data.feed import StepInputs
from headrace.trainer.distributed import Layout
from headrace.trainer.model.micro_batch import MicroBatch, StageOutput
from headrace.trainer.model.stage import Stage
from headrace.trainer.run.anomalies import Outcome
from headrace.trainer.run.metrics import RowLoss
from headrace.trainer.run.row_losses import losses_of
from headrace.trainer.run.timeline import Timeline


class StageEngine(PipelineEngine):
    """Runs steps of one stage in concert with the other stages.

    Attributes:
        outputs: of the last run, on the last stage, one of each micro-batch.
        timeline: of the instructions, if `profile.timeline` is set.
        router_losses: of the last run, on stages with routers: [micro-batches] scalars.
    """

    def __init__(self, stage: Stage, config: TrainConfig, layout: Layout) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._join_process_group(layout)
        settings = {
            "train_micro_batch_size_per_gpu": config.micro_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "zero_optimization": {"stage": 0},
            "steps_per_print": None,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            module = _as_pipeline_module(stage, layout)
            grid = module.mpu()
            super().__init__(
                args=None,
                model=module,
                mpu=grid,
                config=settings,
                config_class=DeepSpeedConfig(settings, grid),
                dist_init_required=False,
            )
        self.stage = stage
        self.layout = layout
        self._inputs: StepInputs | None = None
        self._next_micro_batch = 0
        self._step_seed = 0
        self.outputs: list[StageOutput] = []
        self.timeline = Timeline(layout.device, wanted=config.profile.timeline)
        if config.profile.timeline:
            self._INSTRUCTION_MAP = {
                kind: self.timeline.timed(kind.__name__, function)
                for kind, function in self._INSTRUCTION_MAP.items()
            }
        self.router_losses: list[Tensor] = []
        self._waiting: dict[int, Tensor] = {}  # buffer -> router loss that has no gradient yet
        self._finish_step: Callable[[], Outcome] | None = None
        self._outcome = Outcome(0.0, None)

    @staticmethod
    def _join_process_group(layout: Layout) -> None:
        """Let DeepSpeed use the process group that exists.

        On CPU it would compile, and reduce through, a shared-memory operator whose segments outlive
        a killed process; gloo serves as well.
        """
        compatible_operators["deepspeed_shm_comm"] = False
        backend = "nccl" if layout.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        assert deepspeed_comm.is_initialized()

    def train_step(
        self, inputs: StepInputs, step_seed: int, finish_step: Callable[[], Outcome]
    ) -> tuple[list[RowLoss], Outcome]:
        """Forward and backward over all micro-batches, then `finish_step`.

        Args:
            finish_step: reduces the gradients, and steps if all is well.

        Returns:
            The loss of each row of this replica (on the last stage, else nothing), and what
            `finish_step` returned.
        """
        self.module.train()
        self._finish_step = finish_step
        train = schedule.TrainSchedule(inputs.micro_batches, self.num_stages, self.stage_id)
        return self._run(train, inputs, step_seed), self._outcome

    def router_loss(self) -> float | None:
        """Of the last run: this rank's part of the mean over layers, before its coefficient."""
        settings = self.stage.router_loss
        if settings is None:
            return None
        losses = torch.stack(self.router_losses).tolist() if self.router_losses else []
        return math.fsum(losses) / settings.coefficient

    def evaluation_step(self, inputs: StepInputs) -> list[RowLoss]:
        """Forward only; the loss of each row of this replica, on the last stage."""
        self.module.eval()
        forward = schedule.InferenceSchedule(inputs.micro_batches, self.num_stages, self.stage_id)
        with torch.no_grad():
            return self._run(forward, inputs, step_seed=0)

    def _run(self, plan: Any, inputs: StepInputs, step_seed: int) -> list[RowLoss]:
        if self.stage.before_step is not None:
            self.stage.before_step()
        self._inputs = inputs
        self._step_seed = step_seed
        self._next_micro_batch = 0
        self.outputs, self.router_losses = [], []
        self._waiting.clear()
        self._exec_schedule(plan)
        return self.row_losses()

    def row_losses(self) -> list[RowLoss]:
        """Losses of this replica's rows in the last run, filling left out; on the last stage."""
        if not self.is_last_stage():
            return []
        assert self._inputs is not None
        return losses_of(self.outputs, self._inputs, self.stage.objective)

    def _global_micro_batch(self, micro_batch: int) -> int:
        return micro_batch * self.layout.replicas + self.layout.replica

    # --- instructions of the schedule ---

    def _load_micro_batch(self, buffer_id: int) -> None:
        """First stage: the token ids of the next micro-batch. The last has its labels already."""
        if self.is_first_stage():
            assert self._inputs is not None and self._inputs.input_ids is not None
            ids = self._inputs.input_ids[self._next_micro_batch]
            self.pipe_buffers["inputs"][buffer_id] = to_device(ids, self.device).long()

    def _forward_pass(self, buffer_id: int) -> None:
        inputs = self._inputs
        assert inputs is not None
        index = self._next_micro_batch
        self._next_micro_batch += 1
        labels = None if inputs.labels is None else inputs.labels[index]
        classes = inputs.control_classes
        side = MicroBatch(
            document_lengths=inputs.document_lengths[index],
            row_lengths=inputs.row_lengths[index],
            labels=None if labels is None else to_device(labels, self.device).long(),
            loss_scale=1.0 / max(1, inputs.pair_count or inputs.trained_tokens),
            router_scale=sum(inputs.row_lengths[index]) / max(1, inputs.tokens),
            seed=self._step_seed + self._global_micro_batch(index),
            pairs=None if inputs.pairs is None else inputs.pairs[index],
            chosen_scale=1.0 / max(1, inputs.chosen_tokens),
            control_classes=None if classes is None else to_device(classes[index], self.device),
        )
        output: StageOutput = self.stage(self.pipe_buffers["inputs"][buffer_id], side)
        if output.token_losses is not None:
            self.outputs.append(replace(output, value=output.value.detach(), router_loss=None))
        if output.router_loss is not None:
            self.router_losses.append(output.router_loss.detach())
            if not self.is_last_stage():
                self._waiting[buffer_id] = output.router_loss
        self.pipe_buffers["outputs"][buffer_id] = output.value

    def _backward_pass(self, buffer_id: int) -> None:
        output = self.pipe_buffers["outputs"][buffer_id]
        router_loss = self._waiting.pop(buffer_id, None)
        roots, gradients = [output], [None if self.is_last_stage() else self.grad_layer]
        if router_loss is not None:
            roots, gradients = [*roots, router_loss], [*gradients, None]
        trained = [root.requires_grad for root in roots]
        if any(trained):  # the first stages may train nothing
            torch.autograd.backward(
                list(compress(roots, trained)), list(compress(gradients, trained))
            )
        self.pipe_buffers["outputs"][buffer_id] = None
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = None

    def _nothing(self) -> None:
        """Tied gradients and replicas are reduced in the optimizer step, in one order."""

    def _optimizer_step(self) -> None:
        assert self._finish_step is not None
        self._outcome = self._finish_step()

    def _broadcast_model(self) -> None:
        """Every replica loads or initialises the same weights by itself."""

    _INSTRUCTION_MAP: dict[type, Callable[..., None]] = {  # noqa: RUF012 (DeepSpeed's)
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.LoadMicroBatch: _load_micro_batch,
        schedule.ForwardPass: _forward_pass,
        schedule.BackwardPass: _backward_pass,
        schedule.ReduceTiedGrads: _nothing,
        schedule.ReduceGrads: _nothing,
        schedule.OptimizerStep: _optimizer_step,
    }


def _as_pipeline_module(stage: Stage, layout: Layout) -> PipelineModule:
    """Each of our stages is one DeepSpeed layer, so cutting, placing and running stays ours."""
    places: list[nn.Module | None] = [None] * layout.stages
    places[layout.stage] = stage
    axes = {"data": layout.replicas, "pipe": layout.stages}
    order = ["pipe", "data"] if layout.columns else ["data", "pipe"]
    topology = ProcessTopology(axes=order, dims=[axes[name] for name in order])
    return PipelineModule(layers=places, topology=topology, partition_method="uniform")
