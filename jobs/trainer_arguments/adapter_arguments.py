"""Rows of PEFT's and bitsandbytes' settings, which every system over transformers has."""

from collections.abc import Callable
from typing import Any

from headrace.jobs.old_systems.axolotl_values import layers, targets
from headrace.jobs.old_systems.equivalents import (
    Equivalent,
    NoEquivalentError,
    Values,
    choice,
    computed,
    none,
    number,
    same,
)
from headrace.jobs.old_systems.quantized import BACKEND, INT8, TYPE, int8
from headrace.schemas.errors import ConfigError

DOUBLE, STORAGE = (f"train.quantization.{key}" for key in ("double_quantization", "storage_type"))
FOUR_BITS = (BACKEND, TYPE, DOUBLE, STORAGE)
KINDS_OF_4_BITS = ("bnb_4bit_quant_type", "BitsAndBytesConfig.bnb_4bit_quant_type")
TWICE = ("use_bnb_nested_quant", "BitsAndBytesConfig.bnb_4bit_use_double_quant")
STORED_AS = ("bnb_4bit_quant_storage", "BitsAndBytesConfig.bnb_4bit_quant_storage")
DTYPES = {name: name for name in ("bfloat16", "float32", "float16")} | {"auto": None, None: None}
INITIAL = {True: "kaiming", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}


def dtype(old: str) -> Equivalent:
    """Return the row of the type of frozen weights."""
    return choice(old, "train.dtype", DTYPES, "trained weights are float32")


def shared_adapter_rows(prefix: str) -> tuple[Equivalent, ...]:
    """Return the rows of settings that have one name everywhere, after a prefix."""
    return (
        number(f"{prefix}lora_alpha", "train.adapter.alpha"),
        number(f"{prefix}lora_dropout", "train.adapter.dropout"),
        same(f"{prefix}use_rslora", "train.adapter.rslora"),
        choice(f"{prefix}use_dora", "train.adapter.kind", {True: "dora", False: None}),
    )


def call_adapter_rows(call: str) -> tuple[Equivalent, ...]:
    """Return the rows of `LoraConfig`, or of another call that takes its arguments."""
    return (
        *shared_adapter_rows(f"{call}."),
        same(f"{call}.r", "train.adapter.rank"),
        computed(f"{call}.target_modules", "train.adapter.target_modules", targets),
        same(f"{call}.target_parameters", "train.adapter.target_parameters"),
        same(f"{call}.modules_to_save", "train.adapter.modules_to_save"),
        computed(f"{call}.layers_to_transform", "train.adapter.layers", layers),
        none(f"{call}.layers_pattern", "layers have their names from the family"),
        computed(f"{call}.init_lora_weights", "train.adapter.init", initial),
        computed(f"{call}.bias", (), unbiased, "refused: biases are not trained"),
    )


def initial(value: Any, _: Values) -> dict[str, Any]:
    """Convert what adapters start from.

    Raises:
        ConfigError: a start that is not there.
    """
    if value not in INITIAL:
        raise ConfigError(f"init_lora_weights: {value!r}: only {', '.join(map(str, INITIAL))}")
    return {"train.adapter.init": INITIAL[value]}


def unbiased(value: Any, _: Values) -> dict[str, Any]:
    if value != "none":
        raise ConfigError(f"bias: {value!r}: biases are not trained beside adapters")
    return {}


def quantization_rows(prefix: str, double: bool = False) -> tuple[Equivalent, ...]:
    """Return the rows of bitsandbytes' switches.

    Args:
        double: scales are quantized too if nothing is said.
    """
    return (
        computed(f"{prefix}load_in_4bit", FOUR_BITS, four_bits(double)),
        computed(f"{prefix}load_in_8bit", INT8, int8),
    )


def four_bits(double: bool) -> Callable[[Any, Values], dict[str, Any]]:
    """Return a converter of the switch of 4 bits, which reads the settings beside it."""

    def convert(value: Any, values: Values) -> dict[str, Any]:
        if not value:
            return {}
        found = {
            BACKEND: "bnb",
            TYPE: first(values, KINDS_OF_4_BITS, "fp4" if is_call(values) else "nf4"),
            DOUBLE: bool(first(values, TWICE, double)),
        }
        stored = first(values, STORED_AS, None)
        return found | ({STORAGE: str(stored)} if stored else {})

    return convert


def is_call(values: Values) -> bool:
    """Return whether `BitsAndBytesConfig` is called, whose own default is fp4."""
    return any(key.startswith("BitsAndBytesConfig.") for key in values)


def first(values: Values, keys: tuple[str, ...], default: Any) -> Any:
    """Return the first value that is given, or a default."""
    return next((values[key] for key in keys if values.get(key) is not None), default)


def when(key: str, *rows: Equivalent) -> tuple[Equivalent, ...]:
    """Return rows that count only beside another key that is on."""

    def counted(row: Equivalent) -> Equivalent:
        convert = row.convert
        assert convert is not None

        def converted(value: Any, values: Values) -> dict[str, Any]:
            if not values.get(key):
                raise NoEquivalentError(f"has no effect there without `{key}`")
            return convert(value, values)

        return Equivalent(row.old, row.new, row.note, converted)

    return tuple(map(counted, rows))
