"""Converters of the values of qlora-pipe's keys."""

from typing import Any

from headrace.jobs.old_systems.equivalents import NoEquivalentError, Values

NO_LIMIT = 1_000_000_000  # their default number of new tokens
SAMPLING = {  # their key -> ours
    "rejected_sampling_max_new_tokens": "train.rejected_sampling.max_new_tokens",
    "sampling.temperature": "train.rejected_sampling.temperature",
    "sampling.min_p": "train.rejected_sampling.min_p",
    "sampling.temperature_last": "train.rejected_sampling.temperature_last",
}


def adapter_kind(full: bool, values: Values) -> dict[str, Any]:
    dora = values.get("use_dora")
    return {"train.adapter.kind": "none" if full else "dora" if dora else "lora"}


def tokens_per_batch(value: int, _: Values) -> dict[str, Any]:
    return {
        "train.loader.pack": "best_fit",
        "train.loader.tokens_per_row": value,
        "train.micro_batch_size": 1,
    }


def loraplus(value: bool, values: Values) -> dict[str, Any]:
    ratio = values.get("optimizer.loraplus_lr_ratio", 16)
    return {"train.optimizer.lora_plus_ratio": float(ratio)} if value else {}


def gamma(value: float, values: Values) -> dict[str, Any]:
    plain = values.get("loss_type", "cross_entropy_loss") == "cross_entropy_loss"
    unused = plain or not value or values.get("rl.method")
    return {} if unused else {"train.objective.gamma": float(value)}


def computed_dtype(value: str, values: Values) -> dict[str, Any]:
    if value not in ("bfloat16", "float32", "float16"):
        raise NoEquivalentError("only bfloat16, float32 and float16 are computed in")
    if value == "float16" and values.get("full_fine_tune"):
        raise NoEquivalentError("float16 is for adapters; whole models take bfloat16 or float32")
    return {"train.dtype": value}


def adapter_dtype(value: str, values: Values) -> dict[str, Any]:
    if value == "float32":
        return {}
    if values.get("optimizer.type") == "adamw_kahan":
        return {"train.dtype": value}
    raise NoEquivalentError('adapters are float32, unless optimizer.type = "adamw_kahan"')


def weight_offload(value: bool | int, _: Values) -> dict[str, Any]:
    if not value:
        return {}
    return {"train.weight_offload": "mlp" if value is True else "experts"}


def rejected_sampling(value: bool, values: Values) -> dict[str, Any]:
    """Nothing is said of a limit of so many tokens that it is none."""
    if not value:
        return {}
    if values.get("rl.method") != "dpo":
        raise NoEquivalentError('pairs are sampled for rl.method = "dpo" only')
    found = {new: values[old] for old, new in SAMPLING.items() if old in values}
    limit = found.get(SAMPLING["rejected_sampling_max_new_tokens"], NO_LIMIT)
    if limit >= NO_LIMIT:
        found.pop(SAMPLING["rejected_sampling_max_new_tokens"], None)
    return {SAMPLING["sampling.temperature"]: 1.0} | found
