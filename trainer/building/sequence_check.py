"""Tries out whether rows of a model can be cut among ranks: only its attention may mix tokens.

A tiny model of the same kind runs with an attention that leaves every token to itself, once over
whole rows and once over half of each, as a rank would. Both must give the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from headrace.schemas.errors import ConfigError, HeadraceError
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.architecture.architecture import Architecture, architecture_of
from headrace.trainer.building.filled_stage import fill_stage
from headrace.trainer.building.model_plan import make_plan
from headrace.trainer.building.partition import Span, StageCut
from headrace.trainer.building.self_check import CPU, DOCUMENTS, FAILURES
from headrace.trainer.building.tiny_config import shrink
from headrace.trainer.layers.sequence_slice import WHOLE, SequenceSlice
from headrace.trainer.stage.micro_batch import MicroBatch
from headrace.trainer.stage.stage import Stage

NAME = "headrace_trial_of_rows"
HALVES = (SequenceSlice(0, 2), SequenceSlice(1, 2))  # without a group: nothing is exchanged
TOLERANCE = 1e-5
TOKENS = sum(DOCUMENTS)


class TokenAlone:
    """An attention of a token to itself, which counts its calls and notes cut masks."""

    def __init__(self) -> None:
        self.calls = 0
        self.is_cut = False

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        self.calls += 1
        self.is_cut |= mask is not None and tuple(mask.shape[-2:]) != (TOKENS, TOKENS)
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        weight = torch.tanh((query * key).sum(-1, keepdim=True))
        return (value * weight).transpose(1, 2), None


def check_rows_can_be_cut(config: TrainConfig, architecture: Architecture) -> None:
    """Refuse models of which a rank cannot hold a part of each row.

    Raises:
        ConfigError: with the reason.
    """
    model_type = architecture.config.model_type
    try:
        problem = find_mixing(architecture, config.model)
    except (*FAILURES, HeadraceError) as error:
        text = str(error).splitlines()[0] if str(error) else ""
        problem = f"a tiny one cannot be run in part ({type(error).__name__}: {text})"
    if problem is not None:
        raise ConfigError(
            f"sequence_parallel = {config.sequence_parallel} does not go with model_type "
            f'"{model_type}": {problem}; use more pipeline_stages in its place'
        )


def find_mixing(architecture: Architecture, model: str) -> str | None:
    """Return what in a model, beside its attention, wants whole rows; None if nothing does.

    Args:
        model: its directory, of which nothing is read.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stage = tiny_stage(architecture, model)
        ids = torch.randint(3, 60, (1, TOKENS))
        alone = TokenAlone()
        AttentionInterface.register(NAME, alone)
        for module in stage.modules():
            part: Any = getattr(module, "config", None)
            if getattr(part, "_attn_implementation", None) is not None:
                part._attn_implementation = NAME
        whole = run(stage, ids, WHOLE)
        if alone.calls != len(stage.layers):
            return (
                f"of {len(stage.layers)} layers {alone.calls} have an attention that can be "
                "exchanged for another"
            )
        for half in HALVES:
            difference = (run(stage, ids, half) - half.share(whole)).abs().max()
            if not difference <= TOLERANCE * whole.abs().max():
                return "tokens are mixed outside of its attention"
        return "its attention cuts its mask" if alone.is_cut else None


def tiny_stage(architecture: Architecture, model: str) -> Stage:
    """Return a whole tiny model of the same kind, with random weights."""
    config = TrainConfig.model_validate(
        {
            "model": model,
            "output_dir": "unused",
            "weights": "random",
            "adapter": {"kind": "none"},
            "router_loss": 0.0,
            "dtype": "float32",
            "optimizer": {"lr": 1.0},
            "datasets": [{"path": "unused"}],
        }
    )
    tiny = architecture_of(shrink(architecture.config), model)
    plan = make_plan(config, tiny)
    layers = Span.whole(range(tiny.config.num_hidden_layers))
    stage, _ = fill_stage(config, plan, StageCut(0, 1, layers), CPU)
    return stage.eval()


@torch.no_grad()
def run(stage: Stage, ids: Tensor, part: SequenceSlice) -> Tensor:
    """Return hidden states of a slice of one row of several documents."""
    stage.sequence = part
    batch = MicroBatch([DOCUMENTS], [TOKENS], None, 1.0, 1.0, seed=0)
    return stage.run(part.share(ids), batch)[0]
