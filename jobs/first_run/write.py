"""The two configs of `headrace init`, with comments, as one would write them by hand."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.jobs.first_run.look import Found
from headrace.jobs.first_run.machine import Fit, Machine
from headrace.schemas.outside_text import visible

LEAST_STEPS = 40  # of an epoch, if the data allow it, else of a run: fewer teach little
MOST_EPOCHS = 3  # that little data are seen
MOST_ROWS_OF_STEP = 64
CPU_TOKENS = 40_000  # some minutes on two cores with a model of 135M


def toml(value: Any) -> str:
    """Return a value as TOML writes it: texts, numbers, lists and inline tables."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def prepare_toml(
    model: Path, output: Path, found: Sequence[Found], sequence_len: int, evaluation: float
) -> str:
    """Return the text of prepare.toml."""
    lines = [
        "# Texts to shards: headrace prepare prepare.toml",
        "# Every key: docs/configuration.md",
        f"output = {toml(str(output))}",
        f"tokenizer = {toml(str(model))}  # the model that will be trained",
        f"sequence_len = {sequence_len}  # tokens of a row",
        f"evaluation_fraction = {evaluation}  # of the documents, held out to judge the result",
        "max_reject_fraction = 0.05  # stop when more is refused; see rejects/ in the output",
    ]
    folders = {folder_of(item) for item in found if item.kind.pictures}
    if folders:
        lines += [
            "",
            "[images]",
            f"model = {toml(str(model))}  # its processor decides sizes and tokens",
            f"folder = {toml(str(min(folders)))}  # that paths of pictures in rows begin at",
        ]
    for name, item in zip(source_names(found), found, strict=True):
        patterns = item.patterns()
        lines += [
            "",
            f"[[sources]]  # {len(item.files):,} file(s): {visible(item.kind.seen)}",
            f"name = {toml(name)}",
            f"type = {toml(item.kind.type)}",
            f"path = {toml(patterns[0] if len(patterns) == 1 else patterns)}",
            *(f"{key} = {toml(value)}" for key, value in item.kind.settings.items()),
        ]
    return "\n".join(lines) + "\n"


def folder_of(found: Found) -> Path:
    """Return the folder in which files lie."""
    return found.root.parent if found.root.is_file() else found.root


def source_names(found: Sequence[Found]) -> list[str]:
    """Return a name for each source, after its file or folder; no name comes twice."""
    names: list[str] = []
    for item in found:
        stem = item.root.name.split(".")[0] or item.root.resolve().name or "data"
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def accumulation(rows: float, replicas: int, stages: int) -> int:
    """Return micro-batches of a step: a power of two that leaves enough steps, and fills stages."""
    least = 4 * stages if stages > 1 else 1
    count = 1
    while count < least or (
        2 * count * replicas <= MOST_ROWS_OF_STEP and rows / (2 * count * replicas) >= LEAST_STEPS
    ):
        count *= 2
    return count


def train_toml(
    values: dict[str, Any], fit: Fit, machine: Machine, rows: float, sequence_len: int
) -> str:
    """Return the text of train.toml.

    Args:
        values: model, output_dir, datasets, evaluation_datasets, adapter and optimizer.
        rows: about how many rows an epoch has.
    """
    micro_batches = accumulation(rows, fit.replicas, fit.stages)
    rows_of_step = micro_batches * fit.replicas
    steps = max(1, round(rows / rows_of_step))
    lines = [
        f"# Shards to an adapter, on {machine.describe()}",
        f"# headrace train train.toml --gpus {max(1, machine.gpus)}",
        f"model = {toml(values['model'])}",
        f"output_dir = {toml(values['output_dir'])}",
        *length_lines(steps, rows_of_step * sequence_len, machine),
        "micro_batch_size = 1",
        f"gradient_accumulation_steps = {micro_batches}",
        f"pipeline_stages = {fit.stages}",
        *(f"{key} = {toml(value)}" for key, value in fit.changes.items() if "." not in key),
        "",
    ]
    values = with_nested(values, fit.changes)
    for name in ("datasets", "evaluation_datasets"):
        for table in values.get(name, []):
            lines += [f"[[{name}]]", *(f"{key} = {toml(v)}" for key, v in table.items()), ""]
    for name in ("vision", "objective", "adapter", "optimizer", "scheduler", "evaluation"):
        if name in values:
            table = values[name]
            lines += [f"[{name}]", *(f"{key} = {toml(v)}" for key, v in table.items()), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def with_nested(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables with the keys of changes that have a dot, as `optimizer.shard`."""
    tables = dict(values)
    for key, value in changes.items():
        table, _, name = key.rpartition(".")
        if table:
            tables[table] = {**tables.get(table, {}), name: value}
    return tables


def length_lines(steps: int, tokens_of_step: int, machine: Machine) -> list[str]:
    """Return the key that says how long a run is, with its reason."""
    epochs = min(MOST_EPOCHS, math.ceil(LEAST_STEPS / steps))
    if not machine.gpus:
        tokens = steps * tokens_of_step
        if tokens > CPU_TOKENS:
            few = max(1, CPU_TOKENS // tokens_of_step)
            said = f"a first look without GPUs; an epoch is about {steps:,} steps"
            return [f"max_steps = {few}  # {said}"]
        epochs = min(epochs, CPU_TOKENS // tokens)
    return [f"epochs = {epochs}  # each about {steps:,} step(s)"]
