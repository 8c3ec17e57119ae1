"""Tries out whether rows of a model can be cut among ranks: only its attention may mix tokens.

A tiny model of the same kind runs with an attention that leaves every token to itself, once over
whole rows and once over half of each, as a rank would. Both must give the same. Where rows come in
slices one after the other, it runs over these with its own attention.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from headrace.trainer.row_slice import WHOLE_ROWS, KeptKeys, KeptRows, RowSlice
from headrace.trainer.sequence_slice import SequenceSlice
from headrace.trainer.stage.micro_batch import MicroBatch
from headrace.trainer.stage.sliced_attention import slice_rows
from headrace.trainer.stage.spec import StageSpec
from headrace.trainer.stage.stage import Stage
from headrace.trainer.stage.tiled_mlp import tile_mlps

NAME = "headrace_trial_of_rows"
HALVES = (SequenceSlice(0, 2), SequenceSlice(1, 2))  # without a group: nothing is exchanged
SLICES = 3
TOLERANCE = 1e-5
DOCUMENTS = [5, 11, 8]
TOKENS = sum(DOCUMENTS)
VOCABULARY = 60  # ids that every tiny model has


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


def find_mixing(spec: StageSpec) -> str | None:
    """Return what in a model, beside its attention, wants whole rows; None if nothing does.

    Args:
        spec: the whole of a tiny model; it is of no use afterwards.
    """
    if any(spec.architecture.stateful):
        return "some of its layers carry a state from token to token"
    ids = token_ids()
    alone = TokenAlone()
    AttentionInterface.register(NAME, alone)
    for module in spec.tree.modules():
        part: Any = getattr(module, "config", None)
        if getattr(part, "_attn_implementation", None) is not None:
            part._attn_implementation = NAME
    whole = run(spec, ids)
    if alone.calls != len(spec.layers):
        return (
            f"of {len(spec.layers)} layers {alone.calls} have an attention that can be "
            "exchanged for another"
        )
    for half in HALVES:
        if is_far(run(replace(spec, sequence=half), ids), half.share(whole)):
            return "tokens are mixed outside of its attention"
    return "its attention cuts its mask" if alone.is_cut else None


def find_unsliced(spec: StageSpec) -> str | None:
    """Return what in a model wants whole rows at once; None if slices of them give the same.

    Args:
        spec: the whole of a tiny model; it is of no use afterwards.
    """
    if any(spec.architecture.stateful):
        return "some of its layers carry a state from token to token"
    ids = token_ids()
    whole = run(spec, ids)
    slice_rows(spec.layer_modules)
    kept = KeptRows([KeptKeys() for _ in spec.layers])
    slices = (run(spec, ids, RowSlice(n, SLICES, kept)) for n in range(SLICES))
    found = [next(slices)]
    keeping = sum(bool(layer.states) for layer in kept.layers)
    if keeping != len(spec.layers):
        return f"of {len(spec.layers)} layers {keeping} have an attention whose keys can be kept"
    if is_far(torch.cat([*found, *slices], dim=1), whole):
        return "slices of a row give something else than the row"
    return None


def find_untiled(spec: StageSpec) -> str | None:
    """Return why MLPs cannot go over tiles of the tokens; None if they can.

    Args:
        spec: as above.
    """
    whole = run(spec, token_ids())
    tiled = tile_mlps(spec.layer_modules, SLICES, keeps_chance=False)
    if tiled != len(spec.layers):
        return f"of {len(spec.layers)} layers {tiled} have an MLP for all tokens alike"
    if is_far(run(spec, token_ids()), whole):
        return "an MLP of a part of the tokens gives something else"
    return None


def token_ids() -> Tensor:
    """Return one row."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (1, TOKENS), generator=generator)


def is_far(found: Tensor, expected: Tensor) -> bool:
    """Return whether two results differ by more than rounding."""
    return not (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.no_grad()
def run(spec: StageSpec, ids: Tensor, rows: RowSlice = WHOLE_ROWS) -> Tensor:
    """Return hidden states of a slice of one row of several documents."""
    stage = Stage(spec).eval()
    batch = MicroBatch([DOCUMENTS], [TOKENS], None, 1.0, 1.0, seed=0, rows=rows)
    return stage.run(spec.sequence.share(rows.share(ids)), batch)[0]
