"""Converters of the values of Axolotl's training keys."""

from typing import Any

from headrace.jobs.migration.equivalents import Converter, NoEquivalentError, Values

SCHEDULERS = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "one_cycle": "one_cycle",
}
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit_paged",
    "lion_32bit": "lion",
    "adafactor": "adafactor",
    "schedule_free_adamw": "adamw_schedule_free",
}


def adapter(value: str, values: Values) -> dict[str, Any]:
    if value not in ("lora", "qlora"):
        raise NoEquivalentError("only lora and qlora have an equivalent")
    return {"train.adapter.kind": "dora" if values.get("peft_use_dora") else "lora"}


def layers(value: Any, _: Values) -> dict[str, Any]:
    numbers = value if isinstance(value, list) else [value]
    return {"train.adapter.layers": ",".join(map(str, numbers))}


def all_linear(value: bool, _: Values) -> dict[str, Any]:
    return {"train.adapter.target_modules": "all-linear"} if value else {}


def in_steps_or_share(steps: str, share: str) -> Converter:
    """An integer counts steps, a fraction below 1 is of the run."""

    def convert(value: Any, values: Values) -> dict[str, Any]:
        if isinstance(value, str):
            return {}
        if value >= 1:
            return {steps: int(value)}
        return {share: value * (values.get("num_epochs") or 1)}

    return convert


def whole(value: float, values: Values) -> dict[str, Any]:
    if values.get("max_steps"):
        return {}
    if value != int(value):
        raise NoEquivalentError("only whole epochs; give max_steps")
    return {"train.epochs": int(value)}


def computation(dtype: str) -> Converter:
    def convert(value: Any, _: Values) -> dict[str, Any]:
        return {"train.dtype": dtype} if value is True or value == "full" else {}

    return convert


def min_rate(value: float, values: Values) -> dict[str, Any]:
    return {"train.scheduler.min_lr": float(value) * float(values["learning_rate"])}


def restarts(value: bool, values: Values) -> dict[str, Any]:
    if not value:
        return {}
    steps = values.get("jagged_restart_steps", values.get("relora_steps"))
    if not steps:
        raise NoEquivalentError("without jagged_restart_steps")
    return {"train.relora.every_steps": int(steps)}


def restart_warmup(value: int, values: Values) -> dict[str, Any]:
    return {"train.relora.warmup_steps": int(value)} if values.get("relora") else {}


def reporting(value: Any, values: Values) -> dict[str, Any]:
    services = ["wandb", *(["mlflow"] if values.get("mlflow_tracking_uri") else [])]
    return {"train.reporting.to": services, "train.reporting.project": value}


def preference(value: str, _: Values) -> dict[str, Any]:
    if value == "ipo":
        return {"train.objective.kind": "dpo", "train.objective.loss": "ipo"}
    if value not in ("dpo", "orpo"):
        raise NoEquivalentError("only dpo, ipo and orpo are trained")
    return {"train.objective.kind": value}
