"""Layouts of a run over so many GPUs, best first: what `headrace plan` proposes.

All keys that only say where and when something is computed are tried together; the rows of a step,
and so the results, stay those of the config.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.train_config import TrainConfig
from headrace.schemas.train.train_rules import check_rules
from headrace.trainer.building.model_size import ModelSize
from headrace.trainer.planning.changes import parts_of_weights, toml, with_changes
from headrace.trainer.planning.layout_rates import HOST, LINK, PRODUCTS, tokens_per_second
from headrace.trainer.planning.memory_model import LayerActivations
from headrace.trainer.planning.planned_run import GIB, RunPlan, TriedModel
from headrace.trainer.planning.run_plan import plan_run

FREE = 0.92  # of a GPU's memory: the rest is for its driver and fragments
SHOWN = 6
TILES, LONG_ROW = 8, 32768  # tokens from which MLPs are tried in tiles
SLICES, LEAST_SLICE = (2, 4, 8), 2048  # tokens that fill a GPU
MOVED = ("mlp", "layers")  # weights that are somewhere else
Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Proposal:
    """A layout that fits, by what it changes of the config."""

    changes: Changes
    run: RunPlan
    rate: float  # tokens a second of all GPUs

    @property
    def row(self) -> list[str]:
        """Return its line of the table."""
        config, peak = self.run.config, f"{self.run.peak / GIB:.1f}"
        shared = (config.sequence_parallel, config.tensor_parallel)
        layout = (config.pipeline_stages, self.run.replicas, *shared)
        slices = config.sequence_slices
        places = [key for key, value in self.changes.items() if value is True or value in MOVED]
        places += ["tiles"] * (config.tiles > 1)
        return [
            f"{self.rate:,.0f}",
            peak,
            *map(str, layout),
            str(slices),
            str(config.gradient_accumulation_steps),
            str(config.activation_checkpointing),
            " ".join(places) or "-",
        ]


def propose(run: RunPlan, gpus: int, memory: float, tried: TriedModel) -> list[Proposal]:
    """Return all layouts that fit, the fastest first; of equal ones the one that changes least.

    Args:
        run: of the config as it is.
        memory: bytes of one GPU.
        tried: of its model.
    """
    found = []
    for changes, changed in plans(run, gpus, tried):
        if changed.peak <= memory * FREE:
            found.append(Proposal(changes, changed, gpus * tokens_per_second(changed)))
    return sorted(found, key=lambda proposal: (-proposal.rate, len(proposal.changes)))


def plans(run: RunPlan, gpus: int, tried: TriedModel) -> Iterator[tuple[Changes, RunPlan]]:
    """Yield what a config may change, and the run that it then is."""
    parts = run.config.tensor_parallel
    counted: dict[tuple[str, int, int], LayerActivations] = {}
    sizes: dict[int, ModelSize] = {parts: run.size}
    counted[results_kept(run.config), run.config.tiles, parts] = run.activations
    for changes in candidates(run, gpus, tried):
        config = with_changes(run.config, changes)
        parts = config.tensor_parallel
        kind = results_kept(config), config.tiles, parts
        known, size = counted.get(kind), sizes.get(parts)
        try:
            check_rules(config)
            changed = plan_run(config, run.plan, gpus, run.sequence_len, known, size)
        except (ValueError, ConfigError):
            continue  # keys that do not go together, or more stages than layers
        counted[kind], sizes[parts] = changed.activations, changed.size
        yield changes, changed


def results_kept(config: TrainConfig) -> str:
    """Return what decides on the results that recomputed layers keep."""
    kind = str(config.activation_checkpointing)
    if kind == "attention":
        return f"{kind} {config.activation_offload}"
    return kind if kind == "selective" else ""


def candidates(run: RunPlan, gpus: int, tried: TriedModel) -> Iterator[Changes]:
    """Yield changes of a config: each layout with each way to save memory."""
    config = run.config
    rows = config.gradient_accumulation_steps * run.replicas
    tiled = can_tile(run, tried)
    parts_of_each = [1, *parts_of_weights(run, gpus, tried)]
    sharing = (shares_of_rows(run, gpus, tried), parts_of_each, slices_of_rows(run, tried))
    for stages, shares, parts, slices in product(divisors(gpus), *sharing):
        replicas, rest = divmod(gpus, stages * shares * parts)
        if rest or rows % replicas or stages > run.plan.architecture.layers:
            continue
        if slices > 1 and (stages == 1 or run.sequence_len % (shares * slices)):
            continue  # nobody waits, or the rows cannot be cut so
        layout: dict[str, Any] = {
            "pipeline_stages": stages,
            "sequence_parallel": shares,
            "tensor_parallel": parts,
            "sequence_slices": slices,
            "gradient_accumulation_steps": rows // replicas,
        }
        if stages == 1 and config.schedule != "1f1b":
            layout["schedule"] = "1f1b"
        if isinstance(config.partition, list) and stages != config.pipeline_stages:
            layout["partition"] = "cost"
        for saved in ways_to_save(config, copies=replicas * shares, tiled=tiled):
            changes = {**layout, **saved}
            now = {key: value_of(config, key) for key in changes}
            yield {key: value for key, value in changes.items() if now[key] != value}


def value_of(config: TrainConfig, key: str) -> Any:
    """Return a setting by its dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def ways_to_save(
    config: TrainConfig, *, copies: int, tiled: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield settings that take memory off a GPU, the mildest first.

    Args:
        copies: ranks that hold the same weights.
        tiled: MLPs may go over tiles of the tokens.
    """
    record, frozen = config.optimizer.record, not config.adapter.record.trains_base
    recomputed: list[dict[str, Any]] = [
        {"activation_checkpointing": kind, "activation_offload": False}
        for kind in ("none", "selective", "full")
    ]
    recomputed.append({"activation_checkpointing": "full", "activation_offload": True})
    if tiled:
        recomputed += [{**recomputed[-2], "tiles": TILES}, {**recomputed[-1], "tiles": TILES}]
        recomputed.append({**recomputed[-1], "activation_checkpointing": "attention"})
    states: list[dict[str, Any]] = [{"optimizer.shard": False, "optimizer.offload": False}]
    if copies > 1 and record.shardable and not config.relora.every_steps:
        states.append({"optimizer.shard": True, "optimizer.offload": False})
    if record.states is not None:
        states.append({"optimizer.shard": False, "optimizer.offload": True})
    weights = [{"weight_offload": "none", "weight_shard": "none"}]
    if frozen and not config.relora.every_steps:
        weights.append({"weight_offload": "mlp", "weight_shard": "none"})
        if copies > 1 and config.rejected_sampling is None:
            weights.append({"weight_offload": "none", "weight_shard": "layers"})
    for again, place, held in product(recomputed, weights, states):
        yield {**again, **place, **held}


def divisors(number: int) -> list[int]:
    """List the divisors of a number."""
    return [n for n in range(1, number + 1) if number % n == 0]


def shares_of_rows(run: RunPlan, gpus: int, tried: TriedModel) -> list[int]:
    """List the numbers of ranks that could share the rows of this model."""
    heads = run.plan.architecture.config.num_attention_heads
    fitting = [n for n in divisors(gpus) if not (heads % n or run.sequence_len % n)]
    if run.config.rejected_sampling is not None or fitting == [1]:
        return [1]
    return fitting if tried.divides_rows else [1]


def can_tile(run: RunPlan, tried: TriedModel) -> bool:
    """Return whether MLPs of this model are tried in tiles."""
    return run.sequence_len >= LONG_ROW and run.config.tiles == 1 and tried.tiles_mlps


def slices_of_rows(run: RunPlan, tried: TriedModel) -> list[int]:
    """List the numbers of slices in which rows of this model could go through stages."""
    now, tokens = run.config.sequence_slices, run.sequence_len
    fitting = [n for n in SLICES if not tokens % n and tokens // n >= LEAST_SLICE]
    numbers = sorted({1, now, *fitting})
    return numbers if numbers == [1] or tried.slices_rows else [1]


def proposals(run: RunPlan, gpus: int, memory: float, tried: TriedModel) -> str:
    """Return the table of the best layouts, and the keys of the first."""
    found = propose(run, gpus, memory, tried)
    if not found:
        return f"No layout of {gpus} GPU(s) of {memory / GIB:.1f} GiB holds this run."
    head = "tokens/s GiB stages replicas shares parts slices micro-batches checkpointing others"
    rows = [head.split(), *(proposal.row for proposal in different(found)[:SHOWN])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in rows]
    changes = [f"  {key} = {toml(value)}" for key, value in found[0].changes.items()]
    return "\n".join(
        [
            f"Layouts of {gpus} GPU(s) that fit, by expected rate "
            f"({PRODUCTS / 1e12:.0f} TFLOP/s a GPU, {LINK / 1e9:.0f} GB/s between GPUs, "
            f"{HOST / 1e9:.0f} GB/s to host memory):",
            *lines,
            "The first by these keys:" if changes else "The first is the config as it is.",
            *changes,
        ]
    )


def different(found: list[Proposal]) -> list[Proposal]:
    """Return the best of each layout, so that the table shows several."""
    best: dict[tuple[str, ...], Proposal] = {}
    for proposal in found:
        best.setdefault(tuple(proposal.row[2:6]), proposal)
    return list(best.values())
