"""Converters of the values of fsdp_qlora's flags."""

from typing import Any

from headrace.jobs.migration.equivalents import Converter, NoEquivalentError, Values
from headrace.jobs.migration.quantized import BACKEND, TYPE

KINDS = {
    "full": "none",
    "lora": "lora",
    "custom_lora": "lora",
    "qlora": "lora",
    "custom_qlora": "lora",
    "hqq_lora": "lora",
    "bnb_dora": "dora",
    "hqq_dora": "dora",
    "bnb_llama_pro": "blocks",
    "hqq_llama_pro": "blocks",
}


def train_type(value: str, _: Values) -> dict[str, Any]:
    """Convert a training type to the adapter, and to the format of the weights: NF4 or HQQ."""
    if value not in KINDS:
        raise NoEquivalentError(f"only {', '.join(KINDS)} have an equivalent")
    found: dict[str, Any] = {"train.adapter.kind": KINDS[value]}
    if value.startswith("hqq"):
        return found | {BACKEND: "hqq"}
    if value.startswith("bnb") or value.endswith("qlora"):
        return found | {BACKEND: "bnb", TYPE: "nf4"}
    return found


def bits(value: int, values: Values) -> dict[str, Any]:
    """Only HQQ's may differ from 4."""
    hqq = values.get("--train_type", "qlora").startswith("hqq")
    return {"train.quantization.bits": value} if hqq else {}


def offload(value: bool, values: Values) -> dict[str, Any]:
    """Convert activation offloading, which exists for recomputed layers only."""
    if not value:
        return {}
    if not values.get("--use_gradient_checkpointing", True):
        raise NoEquivalentError("without --use_gradient_checkpointing")
    return {"train.activation_offload": True}


def with_adapter(key: str, cast: type) -> Converter:
    """A setting that only adapters have."""

    def convert(value: Any, values: Values) -> dict[str, Any]:
        kind = KINDS.get(values.get("--train_type", "qlora"))
        return {key: cast(value)} if kind in ("lora", "dora") else {}

    return convert


def targets(value: str, values: Values) -> dict[str, Any]:
    names = {"all": "all-linear", "default": ["q_proj", "v_proj"]}
    if value not in names:
        raise NoEquivalentError("only all and default have an equivalent")
    kind = KINDS.get(values.get("--train_type", "qlora"))
    return {"train.adapter.target_modules": names[value]} if kind in ("lora", "dora") else {}


def schedule(value: str, values: Values) -> dict[str, Any]:
    """Its linear and cosine warm up over a tenth of the steps."""
    if value not in ("constant", "linear", "cosine"):
        raise NoEquivalentError("only constant, linear and cosine have an equivalent")
    found: dict[str, Any] = {"train.scheduler.type": value}
    if value != "constant":
        found["train.scheduler.warmup_fraction"] = 0.1
    if value == "cosine":
        found["train.scheduler.min_lr"] = 0.1 * float(values.get("--lr", 1e-5))
    return found


def clipping(value: Any, values: Values) -> dict[str, Any]:
    wanted = values.get("--apply_gradient_clipping", False)
    limit = float(values.get("--grad_norm", 0.3)) if wanted else 0.0
    return {"train.optimizer.gradient_clipping": limit}


def checkpointing(value: bool, _: Values) -> dict[str, Any]:
    return {"train.activation_checkpointing": "full" if value else "none"}


def report_to(value: str, _: Values) -> dict[str, Any]:
    return {"train.reporting.to": ["wandb"]} if value == "wandb" else {}
