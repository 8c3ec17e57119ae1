"""Converters of Axolotl's optimizers and of the keys that they read."""

from collections.abc import Mapping
from typing import Any

from headrace.jobs.old_systems.equivalents import (
    Equivalent,
    NoEquivalentError,
    Values,
    computed,
    exact_choice,
)
from headrace.schemas.errors import ConfigError

TYPE, MOMENTUM, EPS = (f"train.optimizer.{key}" for key in ("type", "momentum", "eps"))
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw": "adamw",
    "adamw_torch_xla": "adamw",
    "adamw_apex_fused": "adamw",
    "optimi_adamw": "adamw",
    "paged_adamw": "adamw_paged",
    "paged_adamw_32bit": "adamw_paged",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit_paged",
    "lion_32bit": "lion",
    "lion_pytorch": "lion",
    "lion_8bit": "lion_8bit",
    "paged_lion_32bit": "lion_paged",
    "paged_lion_8bit": "lion_8bit_paged",
    "adafactor": "adafactor_unscaled",
    "sgd": "sgd",
    "adagrad": "adagrad",
    "schedule_free_adamw": "adamw_schedule_free",
}
BY_ANOTHER = "bitsandbytes' 8 bits, not torchao's"
MORE_BITS = "bitsandbytes' 8 bits, not torchao's 4"
NEAR = {
    "muon": (
        "muon",
        "a matrix is stepped by 0.2 sqrt(its larger side) times the rate, there by sqrt(rows / "
        "columns), so that the rate is another; without `optim_args.adjust_lr: rms_norm`",
    ),
    "adamw_anyprecision": ("adamw_kahan", "with Kahan summation, and states in `dtype`"),
    "adamw_torch_8bit": ("adamw_8bit", BY_ANOTHER),
    "ao_adamw_8bit": ("adamw_8bit", BY_ANOTHER),
    "adamw_torch_4bit": ("adamw_8bit", MORE_BITS),
    "ao_adamw_4bit": ("adamw_8bit", MORE_BITS),
}
NAMED = exact_choice("optimizer", TYPE, OPTIMIZERS, NEAR)
ADAGRAD_EPS = 1e-10  # torch's; `adam_epsilon` is not read there
READ_ARGS = {  # of `optim_args`, by optimizer
    "sgd": ("momentum",),
    "adagrad": ("eps",),
    "muon": ("mu", "adjust_lr"),
}
WITHOUT = {  # of `optim_args`: what would train something else unless it is off
    "sgd": ("nesterov", "dampening"),
    "adagrad": ("lr_decay",),
    "muon": ("nesterov", "flatten"),
}
OFF = ("", "0", "0.0", "false", "no")


def optimizer(value: Any, values: Values) -> dict[str, Any]:
    """Convert the optimizer with the arguments that it reads."""
    args = arguments(values)
    extra: dict[str, Any] = {}
    if value == "sgd":
        extra = {MOMENTUM: float(args.get("momentum", 0.0))}
    elif value == "adagrad":
        extra = {EPS: float(args.get("eps", ADAGRAD_EPS))}
    elif value == "muon" and "mu" in args:
        extra = {MOMENTUM: float(args["mu"])}
    if value == "muon" and args.get("adjust_lr") == "rms_norm":
        return {TYPE: "muon"} | extra
    assert NAMED.convert is not None
    try:
        return NAMED.convert(value, values) | extra
    except NoEquivalentError as near:
        raise NoEquivalentError(str(near), near.instead | extra) from None


def arguments(values: Values) -> dict[str, str]:
    """Return `optim_args`, given as a table or as text, `key=value,...`."""
    given = values.get("optim_args") or {}
    if isinstance(given, Mapping):
        return {str(key): str(value) for key, value in given.items()}
    pairs = (part.partition("=") for part in str(given).replace(" ", "").split(","))
    return {key: value for key, _, value in pairs}


def remaining_arguments(value: Any, values: Values) -> dict[str, Any]:
    """Report arguments that are not taken over.

    Raises:
        ConfigError: one that would train something else.
    """
    kind = str(values.get("optimizer"))
    args = arguments(values)
    for key in WITHOUT.get(kind, ()):
        usual = kind == "muon" and key == "nesterov"  # on there unless it is said
        if key in args and (args[key].lower() in OFF) == usual:
            raise ConfigError(
                f"optim_args: {key} = {args[key]} of {kind} is not there; remove it to train "
                "without it"
            )
    left = sorted(args.keys() - {*READ_ARGS.get(kind, ()), *WITHOUT.get(kind, ())})
    if left:
        raise NoEquivalentError(f"{', '.join(left)}: `optimizer` has keys for what it knows")
    return {}


def epsilon(value: float, values: Values) -> dict[str, Any]:
    return {} if values.get("optimizer") == "adagrad" else {EPS: float(value)}


OPTIMIZER_ROWS: tuple[Equivalent, ...] = (
    computed(
        "optimizer",
        (TYPE, MOMENTUM, EPS),
        optimizer,
        f"{NAMED.note}. `sgd`: momentum 0 unless `optim_args` has it; `adagrad`: eps 1e-10",
    ),
    computed(
        "optim_args",
        (MOMENTUM, EPS),
        remaining_arguments,
        "`momentum` of sgd, `eps` of adagrad, `mu` and `adjust_lr` of muon",
    ),
    computed("adam_epsilon", EPS, epsilon, "not of `adagrad`, as there", default=1e-8),
    computed("adam_eps", EPS, epsilon, "as `adam_epsilon`"),
)
