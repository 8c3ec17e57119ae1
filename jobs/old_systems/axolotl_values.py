"""Converters of the values of Axolotl's training keys."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from headrace.jobs.old_systems.equivalents import Converter, Equivalent, NoEquivalentError, Values
from headrace.schemas.errors import ConfigError

NUMBER = r"\(?(?:\?:)?\[?(?:\\d|0-9|\d-\d)\]?[+*]?\)?"
FRONT = re.compile(
    rf"^(?:.*(?:layers|blocks|h)\\?\.(?:{NUMBER}|\.[+*])\\?\.|\^?\.[*+]\??(?:\\?\.)?)"
)
ONE_DIGIT = re.compile(r"(\[0-9\]|\[\\d\]|(?<!\[)\\d)(?![+*])")  # of a layer's number
TOKEN = re.compile(r"\(\?:|\(|\)|\||\\?\.|[\w-]+|\$")
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP_ENDS = ("up_proj", "down_proj", "gate_proj", "gate_up_proj", "fc1", "fc2", "w1", "w2", "w3")
ABSENT = "cross_attn"  # which examples name in vain: no language model here has one

ROPE = "train.model_overrides.rope_scaling"
POSITIONS = "max_position_embeddings"


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


def half_precision(value: Any, values: Values) -> dict[str, Any]:
    if value is not True:
        return {}
    if not values.get("adapter"):
        raise NoEquivalentError("float16 is for adapters; whole models take bfloat16 or float32")
    return {"train.dtype": "float16"}


def restarts(value: bool, values: Values) -> dict[str, Any]:
    if not value:
        return {}
    steps = values.get("jagged_restart_steps", values.get("relora_steps"))
    if not steps:
        raise NoEquivalentError("without jagged_restart_steps")
    return {"train.relora.every_steps": int(steps)}


def restart_steps(value: int, values: Values) -> dict[str, Any]:
    """Convert nothing: the key of ReLoRA reads these steps.

    Raises:
        NoEquivalentError: there is no ReLoRA.
    """
    if value and not values.get("relora"):
        raise NoEquivalentError("without relora the learning rate alone would start anew")
    return {}


KTO_WEIGHTS = ("desirable_weight", "undesirable_weight")


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
    if value == "kto":
        names = [name for name in KTO_WEIGHTS if values.get(f"kto_{name}") is not None]
        weights = {f"train.objective.{name}": float(values[f"kto_{name}"]) for name in names}
        return {"train.objective.kind": value, **weights}
    if value not in ("dpo", "orpo"):
        raise NoEquivalentError("only dpo, ipo, kto, orpo and simpo are trained")
    return {"train.objective.kind": value}


def answer_limit(value: int, values: Values) -> dict[str, Any]:
    return {"train.evaluation.max_new_tokens": int(value)} if values.get("eval_table_size") else {}


def scoring(value: bool, _: Values) -> dict[str, Any]:
    return {"train.objective.kind": "reward"} if value else {}


def dynamic(value: bool, _: Values) -> dict[str, Any]:
    return {"train.objective.kind": "dft"} if value else {}


def targets(value: str | Sequence[str], values: Values) -> dict[str, Any]:
    """Convert names, or a regular expression that stands for a list of them.

    Raises:
        NoEquivalentError: names of tables of tokens beside all linear layers.
    """
    if values.get("lora_target_linear"):  # Axolotl takes both together
        tables = [] if isinstance(value, str) else [name for name in value if is_table(name)]
        if tables:
            raise NoEquivalentError(f"{', '.join(tables)} beside lora_target_linear: true")
        return {}
    if isinstance(value, str) and value not in ("all-linear", "all_linear"):
        names: str | list[str] | None = None if ONE_DIGIT.search(value) else module_names(value)
        if names is None:  # matched as a whole, as by PEFT
            names = value
        return {"train.adapter.target_modules": names}
    found = "all-linear" if isinstance(value, str) else list(value)
    return {"train.adapter.target_modules": found}


def is_table(name: str) -> bool:
    """Return whether a target is an embedding or a head, which all linear layers leave out."""
    return name.split(".")[-1] in ("lm_head", "embed_tokens", "embed_out", "wte")


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


def unless_started(row: Equivalent) -> Equivalent:
    """Return a row that says nothing where training starts from an adapter, as in Axolotl."""
    convert = row.convert
    assert convert is not None

    def converted(value: Any, values: Values) -> dict[str, Any]:
        return {} if values.get("lora_model_dir") else convert(value, values)

    return replace(row, convert=converted)


def token_rows(value: Any, _: Values) -> dict[str, Any]:
    """Convert ids of tokens whose rows are trained, which may be given by module."""
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    if any(found != lists[0] for found in lists):
        raise NoEquivalentError("the same ids for embedding and head have one")
    return {"train.adapter.trainable_token_indices": list(lists[0])} if lists else {}


def new_tokens(value: Any, values: Values) -> dict[str, Any]:
    """Convert tokens that are added to the tokenizer, with the special ones behind them."""
    special = (values.get("special_tokens") or {}).get("additional_special_tokens") or []
    found = [*(value or ()), *special]
    return {"train.model_overrides.new_tokens": found} if found else {}


def overrides(value: Any, values: Values) -> dict[str, Any]:
    """Convert settings that take the place of those in config.json."""
    found: dict[str, Any] = {}
    for key, setting in (value or {}).items():
        if key == POSITIONS:
            found[f"train.model_overrides.{POSITIONS}"] = setting
        elif key in ("rope_scaling", "rope_parameters"):
            found |= rope_scaling(setting, values)
    left = set(value or ()) - {POSITIONS, "rope_scaling", "rope_parameters"}
    if left:
        raise NoEquivalentError(f"{', '.join(sorted(left))}: edit config.json of the model", found)
    return found


def rope_scaling(value: Any, _: Values) -> dict[str, Any]:
    """Convert the scaling of rotary positions, whose type is `type` in older files."""
    if not value:
        return {}
    table = {("rope_type" if key == "type" else key): setting for key, setting in value.items()}
    numbers = {
        key: float(v) for key, v in table.items() if type(v) is int and "position" not in key
    }
    return {ROPE: table | numbers}


# --- regular expressions: PEFT takes `model.layers.[\d]+.(mlp|self_attn).(up|q)_proj` for whole
# names; ours are lists of ends of names, so the part after the layer's number is enough ---


def module_names(pattern: str) -> list[str] | None:
    """Return the ends of module names that a pattern stands for; None if they cannot be listed."""
    front = FRONT.match(pattern)
    if front is None:
        name = literal(pattern)
        return None if name is None else [name]
    names = alternatives(pattern[front.end() :])
    if names is None:
        return None
    found = [name for name in dict.fromkeys(names) if exists(name)]
    return found or None


def literal(pattern: str) -> str | None:
    """Return the text that a pattern stands for as it is; None if it leaves something open."""
    text = pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".")
    return text if re.fullmatch(r"[\w.-]+", text) else None


def alternatives(pattern: str) -> list[str] | None:
    """Return all texts that a pattern of names, dots and `(a|b)` matches; None of any other."""
    tokens = TOKEN.findall(pattern)
    if "".join(tokens) != pattern:
        return None
    texts, rest = choices(tokens)
    return None if rest else texts


def choices(tokens: list[str]) -> tuple[list[str], list[str]]:
    """Return the texts of `a|b|...` up to a closing bracket, and the tokens from there on."""
    found: list[str] = []
    parts: list[list[str]] = []
    while tokens and tokens[0] != ")":
        token, *tokens = tokens
        if token in ("(", "(?:"):
            inner, tokens = choices(tokens)
            parts.append(inner)
            tokens = tokens[1:]
        elif token == "|":
            found += ["".join(part) for part in product(*parts)]
            parts = []
        elif token != "$":
            parts.append([token.removeprefix("\\")])
    return found + ["".join(part) for part in product(*parts)], tokens


def exists(name: str) -> bool:
    """Return whether a layer can have it: no attention has an MLP's weights, nor the reverse."""
    *parents, end = name.split(".")
    if ABSENT in parents:
        return False
    if any(parent in ATTENTION for parent in parents):
        return end not in MLP_ENDS
    return "mlp" not in parents or end not in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
