"""States and parameters to save, for tests of checkpoints."""

import torch
from torch import nn

from headrace.schemas.train.run_state import RunState
from headrace.trainer.building.materializer import TrainedParameter


def state(step):
    return RunState(
        step=step,
        next_row=8 * step,
        seed=0,
        tokens=512 * step,
        seconds=1.5 * step,
        global_batch_rows=8,
        stages=1,
        replicas=1,
        config_fingerprint="config",
        data_fingerprint="data",
        files={},
    )


def trained(size=4):
    """One parameter that was stepped once, and its optimizer."""
    parameter = nn.Parameter(torch.arange(float(size)))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(size)
    optimizer.step()
    return [TrainedParameter("model.norm.weight", parameter, owned=True)], optimizer


def names(folder):
    return [path.name for path in folder.finished()]
