"""Saves while training goes on: copy, write in a thread, publish once every stage has written."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headrace.schemas.errors import CheckpointError
from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.publish import explain_os_error, fsync_path
from headrace.schemas.train.run_state import RunState
from headrace.trainer.architecture.model_writer import save_tensors
from headrace.trainer.building.checkpoint_files import Written, stage_file
from headrace.trainer.building.parameter_slots import TrainedParameter
from headrace.trainer.checkpoint.checkpoint_folder import CheckpointFolder, collect_tensors
from headrace.trainer.messages import gather
from headrace.trainer.optim.sharded import take_part
from headrace.trainer.parallel import RankLayout
from headrace.trainer.rendezvous import local_ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written; `written` is this rank's part."""

    state: RunState
    written: Future[Written]


class Saver:
    """Takes checkpoints of a run. Ranks begin each save together and agree on its end.

    A rank's `progress` travels with its report of a step; `settle` reads everybody's. So nothing
    waits for a disk, and a checkpoint is published by the first rank only when all of it is
    durable; then, and only then, older ones go.

    Args:
        background: write while the next steps run, from a copy in host memory.
        weights_only: leave the optimizer's states out.
        node_local: the folder is another one on each machine, and holds the stages run there.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        layout: RankLayout,
        *,
        background: bool,
        weights_only: bool = False,
        node_local: bool = False,
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.background = background
        self.weights_only = weights_only
        self.node_local = node_local
        self._pending: Pending | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def begin(
        self,
        state: RunState,
        trained: Sequence[TrainedParameter],
        optimizer: torch.optim.Optimizer,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start a save of this moment; an earlier one is finished first.

        Raises:
            CheckpointError: a rank could not write.
        """
        self.finish()
        states = None if self.weights_only else optimizer
        if not self.layout.keeps_files(node_local=self.node_local):
            take_part(trained, states)
            written: Future[Written] = Future()
            written.set_result(Written())
        else:
            tensors = collect_tensors(trained, states, kept, copy=self.background)
            path = self.folder.unfinished(state.step) / stage_file(self.layout.stage)
            written = Future()
            if self.layout.writes_weights:
                written = self._thread.submit(write, path, tensors)
            else:
                written.set_result(Written())
        self._pending = Pending(state, written)
        if not self.background:
            self.finish()

    def progress(self) -> Written | None:
        """This rank's part of the pending save, once it is written; for the report of a step."""
        if self._pending is None or not self._pending.written.done():
            return None
        return self._pending.written.result()

    def settle(self, parts: Sequence[Written | None]) -> None:
        """Publish the pending save if every rank has written; every rank is given the same parts.

        Raises:
            CheckpointError: a rank could not write.
        """
        written = [part for part in parts if part is not None]
        if self._pending is None or len(written) < len(parts):
            return
        problems = [part.problem for part in written if part.problem]
        if problems:
            raise CheckpointError(problems[0])
        if self.node_local:
            here = local_ranks()
            written = written[self.layout.node * here : (self.layout.node + 1) * here]
        files = {name: digest for part in written for name, digest in part.files.items()}
        update = {"files": files, "weights_only": self.weights_only}
        state = self._pending.state.model_copy(update=update)
        if self.layout.publishes(node_local=self.node_local):
            path = self.folder.publish(state)
            logger.info("saved %s", path)
        self._pending = None

    def finish(self) -> None:
        """Wait until the pending save is published; every rank takes part.

        Raises:
            CheckpointError: a rank could not write.
        """
        if self._pending is not None:
            mine = self._pending.written.result()
            self.settle(gather(mine, self.layout.world_group))


def write(path: Path, tensors: dict[str, Tensor]) -> Written:
    """Write one stage's file durably; what goes wrong in the thread is for all ranks to know."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path)
        fsync_path(path)
        return Written({path.name: file_sha256(path)})
    except OSError as error:
        return Written(problem=explain_os_error(error, path, "make room, then --resume"))
