"""Converters of the values of jllm's flags."""

from typing import Any

from headrace.jobs.migration.equivalents import NoEquivalentError, Values


def accumulation(value: int, values: Values) -> dict[str, Any]:
    """0 asks to derive it from the global batch; the replicas are not in the command line."""
    if not value:
        rows = values.get("--global_batch_size", 1)
        value = max(1, rows // values.get("--per_device_train_batch_size", 1))
    return {"train.gradient_accumulation_steps": value}


def partition(value: str, _: Values) -> dict[str, Any]:
    words = {"fast": "cost", "mem": "memory", "uniform": "uniform"}
    if value not in words:
        raise NoEquivalentError("numbers there count half layers; list whole layers in `partition`")
    return {"train.partition": words[value]}


def lora(value: int, _: Values) -> dict[str, Any]:
    return {"train.adapter.kind": "lora", "train.adapter.rank": value} if value else {}


def frozen_or_full(value: bool, values: Values) -> dict[str, Any]:
    if values.get("--lora_dim") and not value:
        raise NoEquivalentError(
            "embedding, norms and head beside adapters: name them in adapter.modules_to_save"
        )
    return {}


def modules(value: str, values: Values) -> dict[str, Any]:
    """Fused names of theirs are the model's own names here."""
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    names = [name for part in value.split(",") for name in fused.get(part, [part])]
    return {"train.adapter.target_modules": names} if values.get("--lora_dim") else {}


def recompute(value: int, values: Values) -> dict[str, Any]:
    """Segments of so many layers keep one input each; here a layer is the largest segment."""
    return {"train.activation_checkpointing": "full" if value else "none"}


def background(value: str, _: Values) -> dict[str, Any]:
    return {"train.checkpoint.background": value in ("process", "thread")}


def random_weights(value: bool, _: Values) -> dict[str, Any]:
    return {"train.weights": "random"} if value else {}


def shuffle(value: bool, _: Values) -> dict[str, Any]:
    return {"train.loader.shuffle": not value}


def packed(value: bool, _: Values) -> dict[str, Any]:
    return {"prepare.packing": "concatenate"} if value else {}
