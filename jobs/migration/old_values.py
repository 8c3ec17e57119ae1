"""Conversions that several old systems share."""

from typing import Any

from headrace.jobs.migration.equivalents import Converter, Values

KEEP_ALL = 1_000_000


def warmup(epochs: str) -> Converter:
    """Steps, or below 1 a share of one epoch, which ours counts of all steps.

    Args:
        epochs: the old key of the number of epochs.
    """

    def convert(value: float, values: Values) -> dict[str, Any]:
        if value >= 1 or not value:
            return {"train.scheduler.warmup_steps": int(value)}
        return {"train.scheduler.warmup_fraction": value / max(1, values.get(epochs, 1))}

    return convert


def keep(value: int, _: Values) -> dict[str, Any]:
    """Convert a number of checkpoints to keep; -1 is all."""
    return {"train.checkpoint.keep_last": value if value > 0 else KEEP_ALL}


def if_positive(new: str) -> Converter:
    """A number; 0 and less ask for nothing."""

    def convert(value: int, _: Values) -> dict[str, Any]:
        return {new: value} if value > 0 else {}

    return convert


def share_of_epoch(new: str) -> Converter:
    """Return a converter of "so many times an epoch" to a fraction of an epoch; 0 is never."""

    def convert(value: float, _: Values) -> dict[str, Any]:
        return {new: 1 / value} if value > 0 else {}

    return convert


def activation_checkpointing(value: Any, _: Values) -> dict[str, Any]:
    """A switch, or the word for inputs in host memory."""
    if value in ("cpu", "unsloth", "offload"):
        return {"train.activation_checkpointing": "full", "train.activation_offload": True}
    return {"train.activation_checkpointing": "full" if value else "none"}
