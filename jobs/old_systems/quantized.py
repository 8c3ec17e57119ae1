"""Old settings of quantized weights in terms of `[quantization]`."""

from typing import Any

from headrace.jobs.old_systems.equivalents import (
    Equivalent,
    NoEquivalentError,
    Values,
    computed,
    elsewhere,
    none,
)

BACKEND, TYPE = "train.quantization.backend", "train.quantization.type"
BNB, HQQ = "quantization.bnb", "quantization.hqq"
DYNAMIC = f"{HQQ}.dynamic_config"
BY_NAME = {"nbits": "bits", "group_size": "group_size", "axis": "axis"}
NF4_TWICE = (
    BACKEND,
    TYPE,
    "train.quantization.double_quantization",
    "train.quantization.storage_type",
)
INT8 = (BACKEND, TYPE, "train.quantization.int8_threshold")
LLM_INT8_THRESHOLD = 6.0  # bitsandbytes' default
TYPES = ("float32", "bfloat16", "float16", "uint8")


def nf4(value: bool, _: Values) -> dict[str, Any]:
    """Normal floats of 4 bits."""
    return {BACKEND: "bnb", TYPE: "nf4"} if value else {}


def nf4_twice(value: bool, _: Values) -> dict[str, Any]:
    """The same with quantized scales, packed as bfloat16."""
    return dict(zip(NF4_TWICE, ("bnb", "nf4", True, "bfloat16"), strict=True)) if value else {}


def int8(value: bool, values: Values) -> dict[str, Any]:
    """LLM.int8()."""
    threshold = float(values.get(f"{BNB}.llm_int8_threshold", LLM_INT8_THRESHOLD))
    return dict(zip(INT8, ("bnb", "int8", threshold), strict=True)) if value else {}


def four_bits(value: bool, values: Values) -> dict[str, Any]:
    """qlora-pipe's, whose default is NF4."""
    kind = values.get(f"{BNB}.bnb_4bit_quant_type", "nf4")
    return {BACKEND: "bnb", TYPE: kind} if value else {}


def of_bnb(old: str, new: str) -> Equivalent:
    """A setting of 4-bit weights."""
    where = f"train.quantization.{new}"

    def convert(value: Any, values: Values) -> dict[str, Any]:
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if isinstance(name, str) and name not in TYPES:
            raise NoEquivalentError(f"only {', '.join(TYPES)} have an equivalent")
        return {where: name} if values.get(f"{BNB}.load_in_4bit") else {}

    return computed(f"{BNB}.{old}", where, convert)


def of_hqq(old: str, new: str, note: str = "") -> Equivalent:
    """A setting of HQQ."""
    where = f"train.quantization.{new}"
    return computed(
        f"{HQQ}.{old}", (BACKEND, where), lambda value, _: {BACKEND: "hqq", where: value}, note
    )


def skipped(value: list[str], _: Values) -> dict[str, Any]:
    """The head is left out there whatever is listed."""
    return {"train.quantization.skip_modules": [*value, "lm_head"]}


def by_name(value: Any, _: Values) -> dict[str, Any]:
    """Settings of modules by a part of their names; the first that matches counts, as there.

    Raises:
        NoEquivalentError: a setting of theirs that ours do not have.
    """
    if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
        raise NoEquivalentError("not a table of tables")
    found: dict[str, dict[str, Any]] = {}
    for name, settings in value.items():
        settings = settings.get("weight_quant_params", settings)
        unknown = settings.keys() - BY_NAME.keys()
        if unknown - {"quant_zero", "quant_scale", "view_as_float"}:
            raise NoEquivalentError(f"{name}: only {', '.join(BY_NAME)} have an equivalent")
        found[name] = {BY_NAME[key]: v for key, v in settings.items() if key in BY_NAME}
    return {BACKEND: "hqq", "train.quantization.dynamic_config": found}


QUANTIZED = (
    computed(f"{BNB}.load_in_4bit", (BACKEND, TYPE), four_bits),
    computed(f"{BNB}.load_in_8bit", INT8, int8),
    elsewhere(f"{BNB}.bnb_4bit_quant_type", TYPE),
    of_bnb("bnb_4bit_compute_dtype", "compute_dtype"),
    of_bnb("bnb_4bit_use_double_quant", "double_quantization"),
    of_bnb("bnb_4bit_quant_storage", "storage_type"),
    elsewhere(f"{BNB}.llm_int8_threshold", "train.quantization.int8_threshold"),
    computed(f"{BNB}.llm_int8_skip_modules", "train.quantization.skip_modules", skipped),
    none(f"{BNB}.llm_int8_has_fp16_weight", "weights are quantized once"),
    none(f"{BNB}.llm_int8_enable_fp32_cpu_offload", "a stage lies on one device"),
    of_hqq("nbits", "bits"),
    of_hqq("group_size", "group_size"),
    of_hqq("axis", "axis"),
    of_hqq("skip_modules", "skip_modules"),
    of_hqq("compute_dtype", "compute_dtype", "default there `float32`"),
    none(f"{HQQ}.view_as_float", "packed weights lie as integers"),
    none(f"{HQQ}.quant_zero", "zeros are not quantized again"),
    none(f"{HQQ}.quant_scale", "scales are not quantized again"),
    computed(DYNAMIC, (BACKEND, "train.quantization.dynamic_config"), by_name, "`nbits`: `bits`"),
)
