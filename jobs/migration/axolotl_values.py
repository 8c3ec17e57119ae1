"""Converters of the values of Axolotl's training keys."""

from collections.abc import Sequence
from typing import Any

from headrace.jobs.migration.equivalents import Converter, NoEquivalentError, Values
from headrace.jobs.migration.regular_expressions import literal, module_names
from headrace.schemas.errors import ConfigError

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
    "adamw": "adamw",
    "adamw_torch_xla": "adamw",
    "adamw_apex_fused": "adamw",
    "optimi_adamw": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit_paged",
    "lion_32bit": "lion",
    "lion_pytorch": "lion",
    "schedule_free_adamw": "adamw_schedule_free",
}
NOT_PAGED = "its states lie on the device"
BY_ANOTHER = "bitsandbytes' 8 bits, not torchao's"
MORE_BITS = "bitsandbytes' 8 bits, not torchao's 4"
NEAR_OPTIMIZERS = {
    "paged_adamw": ("adamw", NOT_PAGED),
    "paged_adamw_32bit": ("adamw", NOT_PAGED),
    "paged_lion_32bit": ("lion", NOT_PAGED),
    "adamw_anyprecision": ("adamw_kahan", "with Kahan summation, and states in `dtype`"),
    "adamw_torch_8bit": ("adamw_8bit", BY_ANOTHER),
    "ao_adamw_8bit": ("adamw_8bit", BY_ANOTHER),
    "adamw_torch_4bit": ("adamw_8bit", MORE_BITS),
    "ao_adamw_4bit": ("adamw_8bit", MORE_BITS),
}


def adapter(value: str, values: Values) -> dict[str, Any]:
    if value not in ("lora", "qlora"):
        raise ConfigError(
            f"adapter: {value!r}: only lora and qlora have an equivalent; remove the key to train "
            "the whole model"
        )
    return {"train.adapter.kind": "dora" if values.get("peft_use_dora") else "lora"}


def layers(value: Any, _: Values) -> dict[str, Any]:
    numbers = value if isinstance(value, list) else [value]
    return {"train.adapter.layers": ",".join(map(str, numbers))}


def all_linear(value: bool, _: Values) -> dict[str, Any]:
    return {"train.adapter.target_modules": "all-linear"} if value else {}


def in_steps_or_share(steps: str, share: str) -> Converter:
    """An integer counts steps, a fraction below 1 is of the run."""

    def convert(value: Any, values: Values) -> dict[str, Any]:
        if isinstance(value, str) or not value:
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


def preference(value: str, values: Values) -> dict[str, Any]:
    if value == "ipo":
        return {"train.objective.kind": "dpo", "train.objective.loss": "ipo"}
    if value == "simpo":
        return {
            "train.objective.kind": value,
            "train.objective.gamma": float(values.get("simpo_gamma", 0.5)),
            "train.objective.sft_weight": float(values.get("cpo_alpha", 1.0)),
        }
    if value not in ("dpo", "orpo"):
        raise NoEquivalentError("only dpo, ipo, orpo and simpo are trained")
    return {"train.objective.kind": value}


def dynamic(value: bool, _: Values) -> dict[str, Any]:
    return {"train.objective.kind": "dft"} if value else {}


DEFAULT_WARMUP = "3% of the steps"
MOST_DEFAULT_STEPS = 100


def warmup(value: Any, values: Values) -> dict[str, Any]:
    """Convert steps, below 1 a share of all, and Axolotl's choice where nothing is said."""
    if value == DEFAULT_WARMUP:
        if values.get("warmup_ratio") is not None:
            return {}
        steps = int(0.03 * values.get("max_steps", 0) or 0)
        if steps > 0:
            return {"train.scheduler.warmup_steps": min(steps, MOST_DEFAULT_STEPS)}
        value = 0.03
    if 0 < value < 1:
        return {"train.scheduler.warmup_fraction": float(value)}
    return {"train.scheduler.warmup_steps": int(value)}


def warmup_share(value: float, _: Values) -> dict[str, Any]:
    return {"train.scheduler.warmup_fraction": float(value)} if value else {}


def targets(value: str | Sequence[str], _: Values) -> dict[str, Any]:
    """Convert names, or a regular expression that stands for a list of them."""
    if isinstance(value, str) and value not in ("all-linear", "all_linear"):
        names = module_names(value)
        if names is None:
            raise NoEquivalentError(
                "a regular expression whose names cannot be listed; `all-linear` is trained "
                "instead: write adapter.target_modules by hand"
            )
        return {"train.adapter.target_modules": names}
    found = "all-linear" if isinstance(value, str) else list(value)
    return {"train.adapter.target_modules": found}


def unfrozen(value: Sequence[str], values: Values) -> dict[str, Any]:
    """Convert the weights that full fine-tuning trains, which Axolotl matches from the start.

    Raises:
        ConfigError: a regular expression, which would train something else.
    """
    if values.get("adapter") or not value:
        return {}
    names = [literal(pattern) for pattern in value]
    for pattern, name in zip(value, names, strict=True):
        if name is None:
            raise ConfigError(
                f"unfrozen_parameters: {pattern!r}: a regular expression; list the parts of names "
                "that it stands for, as adapter.target_modules and adapter.layers have them"
            )
    return {"train.adapter.target_modules": names}


def experts(value: bool, values: Values) -> dict[str, Any]:
    quantized = values.get("load_in_4bit") or values.get("load_in_8bit")
    return {"train.quantization.experts": bool(value)} if quantized else {}


def offload(value: Any, values: Values) -> dict[str, Any]:
    if not value:
        return {}
    if not values.get("gradient_checkpointing"):
        raise NoEquivalentError("without gradient_checkpointing")
    return {"train.activation_offload": True}


def compiled(value: Any, _: Values) -> dict[str, Any]:
    return {"train.compile": bool(value)}


def accumulation(value: int, values: Values) -> dict[str, Any]:
    """Convert the rows of a step on one device."""
    if values.get("gradient_accumulation_steps") or not value:
        return {}
    rows, held = int(value), int(values.get("micro_batch_size") or 1)
    if rows % held:
        raise ConfigError(
            f"batch_size: {rows}: not a multiple of micro_batch_size {held}; give "
            "gradient_accumulation_steps instead"
        )
    return {"train.gradient_accumulation_steps": rows // held}


def logged(value: float, _: Values) -> dict[str, Any]:
    if 0 < value < 1:
        raise NoEquivalentError("a share of all steps; every step has its line")
    return {"train.reporting.every_steps": int(value)} if value else {}
