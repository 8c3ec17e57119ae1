"""Arguments of transformers' Trainer (5.23, and older names), which several systems pass on."""

from typing import Any

from headrace.jobs.old_systems.axolotl_optimizers import OPTIMIZER_ROWS
from headrace.jobs.old_systems.axolotl_schedules import COURSE, kwargs, lowest, stable_decay
from headrace.jobs.old_systems.equivalents import (
    KEEP_ALL,
    Converter,
    Equivalent,
    NoEquivalentError,
    Values,
    choice,
    computed,
    elsewhere,
    if_positive,
    none,
    number,
    refused,
    same,
)
from headrace.jobs.trainer_arguments.transformers_unused import unused_rows

SCHEDULE, MIN_LR, STEPS, FRACTION, DECAY, DECAY_SHAPE = (
    f"train.scheduler.{key}"
    for key in ("type", "min_lr", "warmup_steps", "warmup_fraction", "decay_steps", "decay_shape")
)
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr")
OFF_WORDS = (None, False, "none", "no")
SERVICES = ("wandb", "mlflow")


def schedule(value: Any, values: Values) -> dict[str, Any]:
    """Convert a schedule of transformers with the numbers that it reads."""
    assert COURSE.convert is not None
    words = {**values, "lr_scheduler": value}
    if value == "warmup_stable_decay":
        return {SCHEDULE: value} | stable_decay(words)
    if value not in SCHEDULES:
        return COURSE.convert("no schedule" if value in ("one_cycle", "rex") else value, words)
    floor = {MIN_LR: lowest(words)} if value == "cosine_with_min_lr" else {}
    return COURSE.convert(value, words) | floor


def schedule_arguments(value: Any, values: Values) -> dict[str, Any]:
    read = {
        "cosine_with_min_lr": {"min_lr", "min_lr_rate"},
        "warmup_stable_decay": {"num_decay_steps", "decay_type", "min_lr_ratio"},
    }.get(str(values.get("lr_scheduler_type")), set())
    left = sorted(kwargs({"lr_scheduler_kwargs": value}).keys() - read)
    if left:
        raise NoEquivalentError(f"{', '.join(left)}: `scheduler` has keys for what it knows")
    return {}


def warmup(value: float, values: Values) -> dict[str, Any]:
    """Convert steps, below 1 a share of all; `constant` has none."""
    if not value:
        return {}
    if values.get("lr_scheduler_type") == "constant":
        raise NoEquivalentError("`constant` has no warmup there; `constant_with_warmup` does")
    return {FRACTION: float(value)} if 0 < value < 1 else {STEPS: int(value)}


def epochs(value: float, values: Values) -> dict[str, Any]:
    if (values.get("max_steps") or 0) > 0:
        return {}
    if value != int(value):
        raise NoEquivalentError("only whole epochs; give max_steps")
    return {"train.epochs": int(value)}


def at_steps(strategy: str, new: str) -> Converter:
    """Return a converter of steps between two events, which count if the strategy is `steps`."""

    def convert(value: float, values: Values) -> dict[str, Any]:
        default = "steps" if strategy == "save_strategy" else "no"
        if str(given(values, strategy) or default) != "steps" or not value:
            return {}
        if value < 1:
            raise NoEquivalentError("a share of all steps; give a number of steps")
        return {new: int(value)}

    return convert


def given(values: Values, key: str) -> Any:
    """Return a value by its name of today or of earlier versions."""
    older = {"eval_strategy": "evaluation_strategy"}
    return values.get(key, values.get(older.get(key, key)))


def strategy(new: str, steps: str) -> Converter:
    """Return a converter of when something is done, beside the key of the number of steps."""

    def convert(value: Any, values: Values) -> dict[str, Any]:
        name = str(getattr(value, "value", value))
        if name == "epoch":
            return {f"{new}.every_epochs": 1.0}
        if name == "steps" and steps == "eval_steps" and not values.get(steps):
            return {f"{new}.every_steps": int(values.get("logging_steps") or 500)}
        if name in ("steps", "no"):
            return {}
        if name == "best":
            return {f"{new}.keep_best": True}
        raise NoEquivalentError("only steps, epoch, best and no")

    return convert


def kept(value: int | None, _: Values) -> dict[str, Any]:
    return {"train.checkpoint.keep_last": value or KEEP_ALL}


def recomputed(value: Any, _: Values) -> dict[str, Any]:
    """Convert the switch; Unsloth's word means that inputs lie in host memory."""
    if value == "unsloth":
        return {"train.activation_checkpointing": "full", "train.activation_offload": True}
    on = value not in OFF_WORDS and str(value).lower() != "false"
    return {"train.activation_checkpointing": "full" if on else "none"}


def services(value: Any, values: Values) -> dict[str, Any]:
    names = [value] if isinstance(value, str) else list(value or [])
    known = [name for name in (SERVICES if "all" in names else names) if name in SERVICES]
    found = {"train.reporting.to": known} if known and "all" not in names else {}
    others = set(names) - {*SERVICES, "none", "tensorboard", "all"}
    if "all" in names or others:
        raise NoEquivalentError("tensorboard is always there; wandb and mlflow by name", found)
    return found


def computation(dtype: str) -> Converter:
    def convert(value: Any, _: Values) -> dict[str, Any]:
        return {"train.dtype": dtype} if value is True else {}

    return convert


def clipping(value: float | None, _: Values) -> dict[str, Any]:
    return {"train.optimizer.gradient_clipping": float(value or 0)}


OPTIMIZER, ARGUMENTS, EPSILON, _ = OPTIMIZER_ROWS


def named(row: Equivalent, old: str) -> Equivalent:
    """Return an optimizer's row under transformers' name of the key."""
    convert = row.convert
    assert convert is not None

    def converted(value: Any, values: Values) -> dict[str, Any]:
        return convert(getattr(value, "value", value), {"optimizer": values.get("optim"), **values})

    return Equivalent(old, row.new, row.note, converted, row.default)


EVALUATED = ("train.evaluation.every_steps", "train.evaluation.every_epochs")
SAVED = tuple(f"train.checkpoint.{key}" for key in ("every_steps", "every_epochs", "keep_best"))

TRAINING_ROWS: tuple[Equivalent, ...] = (
    same("output_dir", "train.output_dir", default="trainer_output"),
    same("per_device_train_batch_size", "train.micro_batch_size", default=8),
    none(
        "per_device_eval_batch_size",
        "evaluation uses `micro_batch_size`; results do not depend on it",
    ),
    same("gradient_accumulation_steps", "train.gradient_accumulation_steps"),
    computed("num_train_epochs", "train.epochs", epochs, default=3),
    computed("max_steps", "train.max_steps", if_positive("train.max_steps")),
    number("learning_rate", "train.optimizer.lr", default=5e-5),
    computed(
        "lr_scheduler_type",
        (SCHEDULE, MIN_LR, DECAY, DECAY_SHAPE),
        schedule,
        "others are refused",
        default="linear",
    ),
    computed(
        "lr_scheduler_kwargs",
        (),
        schedule_arguments,
        "of cosine_with_min_lr and warmup_stable_decay, read with the schedule",
    ),
    computed("warmup_steps", (STEPS, FRACTION), warmup, "below 1 a share of all steps"),
    computed("warmup_ratio", (STEPS, FRACTION), warmup),
    named(OPTIMIZER, "optim"),
    named(ARGUMENTS, "optim_args"),
    named(EPSILON, "adam_epsilon"),
    number("weight_decay", "train.optimizer.weight_decay", default=0.0),
    number("adam_beta1", "train.optimizer.beta1"),
    number("adam_beta2", "train.optimizer.beta2", default=0.999),
    computed(
        "max_grad_norm",
        "train.optimizer.gradient_clipping",
        clipping,
        "0 and nothing turn clipping off",
    ),
    refused("label_smoothing_factor", "labels are not smoothed"),
    refused("optim_target_modules", "GaLore and APOLLO are not among the optimizers"),
    computed("bf16", "train.dtype", computation("bfloat16"), "trained weights are float32"),
    none("fp16", '`dtype = "float16"` with adapters, on GPUs without bfloat16'),
    computed(
        "gradient_checkpointing",
        ("train.activation_checkpointing", "train.activation_offload"),
        recomputed,
    ),
    computed(
        "activation_checkpointing",
        ("train.activation_checkpointing", "train.activation_offload"),
        recomputed,
    ),
    choice("torch_compile", "train.compile", {True: True, False: None}),
    number("neftune_noise_alpha", "train.regularization.neftune_alpha"),
    same("seed", "train.seed", default=42),
    none("data_seed", "`seed` decides the order of rows too"),
    computed(
        "eval_strategy",
        EVALUATED,
        strategy("train.evaluation", "eval_steps"),
        "without `eval_steps`, every `logging_steps`",
    ),
    computed("evaluation_strategy", EVALUATED, strategy("train.evaluation", "eval_steps")),
    computed(
        "eval_steps",
        "train.evaluation.every_steps",
        at_steps("eval_strategy", "train.evaluation.every_steps"),
        "if `eval_strategy` is `steps`",
    ),
    same("eval_on_start", "train.evaluation.before_first_step", default=False),
    computed("save_strategy", SAVED, strategy("train.checkpoint", "save_steps")),
    computed(
        "save_steps",
        "train.checkpoint.every_steps",
        at_steps("save_strategy", "train.checkpoint.every_steps"),
        "if `save_strategy` is `steps`",
        default=500,
    ),
    computed("save_total_limit", "train.checkpoint.keep_last", kept, default=0),
    same("save_only_model", "train.checkpoint.weights_only"),
    same("load_best_model_at_end", "train.checkpoint.keep_best", "kept, not loaded"),
    same("logging_steps", "train.reporting.every_steps", "every step has its line"),
    computed("report_to", "train.reporting.to", services),
    same("project", "train.reporting.project"),
    same("run_name", "train.reporting.name"),
    elsewhere("resume_from_checkpoint", "headrace train --resume"),
    *unused_rows(),
)
