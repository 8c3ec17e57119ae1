"""fsdp_qlora's flags (AnswerDotAI/fsdp_qlora at 05ed9f2)."""

from typing import Any

from headrace.jobs.old_systems.command_lines import FSDP_QLORA_TOOLS
from headrace.jobs.old_systems.equivalents import (
    Converter,
    NoEquivalentError,
    OldSystem,
    Values,
    choice,
    computed,
    elsewhere,
    exact_choice,
    if_positive,
    none,
    number,
    same,
)
from headrace.jobs.old_systems.quantized import BACKEND, TYPE
from headrace.schemas.errors import ConfigError

SHARDING = "the model is cut into stages instead: `pipeline_stages`"
PROFILE = "`profile.trace_step` traces a step, `profile.timeline` every step"
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
        raise ConfigError(
            f"--lr_scheduler: {value!r}: there is none here, and any other would train something "
            "else at the same rate; choose constant, linear or cosine"
        )
    found: dict[str, Any] = {"train.scheduler.type": value}
    if value != "constant":
        found["train.scheduler.warmup_fraction"] = 0.1
    if value == "cosine":
        found["train.scheduler.min_lr"] = 0.1 * float(values.get("--lr", 1e-5))
    return found


OPTIMIZER = exact_choice(
    "--optimizer", "train.optimizer.type", {"adamw": "adamw", "adam": "adam", "sgd": "sgd"}
)


def optimizer(value: str, values: Values) -> dict[str, Any]:
    """Convert the optimizer; its SGD is torch's without arguments."""
    assert OPTIMIZER.convert is not None
    plain = {"train.optimizer.momentum": 0.0} if value == "sgd" else {}
    return OPTIMIZER.convert(value, values) | plain


def decay(value: Any, values: Values) -> dict[str, Any]:
    decayed = values.get("--optimizer", "adamw") == "adamw"
    adam = values.get("--optimizer") == "adam"  # which has none here either
    return {} if adam else {"train.optimizer.weight_decay": float(value) if decayed else 0.0}


def clipping(value: Any, values: Values) -> dict[str, Any]:
    wanted = values.get("--apply_gradient_clipping", False)
    limit = float(values.get("--grad_norm", 0.3)) if wanted else 0.0
    return {"train.optimizer.gradient_clipping": limit}


def checkpointing(value: bool, _: Values) -> dict[str, Any]:
    return {"train.activation_checkpointing": "full" if value else "none"}


def report_to(value: str, _: Values) -> dict[str, Any]:
    return {"train.reporting.to": ["wandb"]} if value == "wandb" else {}


FSDP_QLORA = OldSystem(
    "fsdp_qlora",
    (
        none("--world_size", "`headrace train --gpus` says how many processes", -1),
        *FSDP_QLORA_TOOLS,
        computed(
            "--train_type",
            ("train.adapter.kind", BACKEND, TYPE),
            train_type,
            "`…_dora`: `dora`, `…_llama_pro`: `blocks`, others with `lora`: `lora`; `bnb_…` and "
            "`…qlora` over NF4, `hqq_…` over HQQ",
            default="qlora",
        ),
        none("--llama_pro_path", "new blocks are made at start: `adapter.blocks`"),
        same("--model_name", "train.model", default="meta-llama/Llama-2-7b-hf"),
        choice(
            "--precision",
            "train.dtype",
            {
                "bf16": "bfloat16",
                "fp32": "float32",
                "bf16_autocast": "bfloat16",
                "bf16_buffers_autocast": "bfloat16",
                "fp16_autocast": "float16",
            },
            "trained weights are float32",
        ),
        same("--seed", "train.seed", default=42),
        none("--verbose", "each step is printed"),
        none("--master_addr", "set by the launcher", "localhost"),
        elsewhere("--master_port", "headrace train --master-port"),
        computed(
            "--max_steps",
            "train.max_steps",
            if_positive("train.max_steps"),
            "optimizer steps of the whole run",
        ),
        none("--dataset", "name your rows in prepare.toml; `alpaca` is an Axolotl type here"),
        elsewhere("--dataset_samples", "prepare.max_rows", "a random sample of the rows"),
        same("--context_length", "prepare.sequence_len"),
        same("--batch_size", "train.micro_batch_size"),
        same("--gradient_accumulation_steps", "train.gradient_accumulation_steps"),
        computed(
            "--num_epochs",
            "train.epochs",
            lambda value, values: (
                {} if values.get("--max_steps", -1) > 0 else {"train.epochs": value}
            ),
        ),
        none("--sharding_strategy", SHARDING, "full_shard"),
        computed(
            "--use_gradient_checkpointing",
            "train.activation_checkpointing",
            checkpointing,
            default=True,
        ),
        none("--reentrant_checkpointing", "how layers are computed again is not a choice"),
        none("--use_cpu_offload", SHARDING, True),
        computed("--use_activation_cpu_offload", "train.activation_offload", offload),
        none("--low_memory", "a process never holds more than its own stage", True),
        none("--no_sync", "gradients are summed once a step"),
        none("--loading_workers", "each process loads its own stage", -1),
        computed("--n_bits", "train.quantization.bits", bits, "of HQQ, as there"),
        computed(
            "--lora_rank",
            "train.adapter.rank",
            with_adapter("train.adapter.rank", int),
            default=64,
        ),
        computed(
            "--lora_alpha",
            "train.adapter.alpha",
            with_adapter("train.adapter.alpha", float),
            default=16,
        ),
        computed(
            "--lora_dropout",
            "train.adapter.dropout",
            with_adapter("train.adapter.dropout", float),
            default=0.1,
        ),
        computed(
            "--lora_target_modules",
            "train.adapter.target_modules",
            targets,
            '`all`: `"all-linear"`, `default`: `["q_proj", "v_proj"]`',
        ),
        computed(
            "--optimizer",
            ("train.optimizer.type", "train.optimizer.momentum"),
            optimizer,
            f"{OPTIMIZER.note}; `sgd` without momentum and decay",
        ),
        number("--lr", "train.optimizer.lr", default=1e-5),
        computed(
            "--wd",
            "train.optimizer.weight_decay",
            decay,
            "of `adamw` alone, as there",
            default=0.1,
        ),
        computed(
            "--lr_scheduler",
            (
                "train.scheduler.type",
                "train.scheduler.warmup_fraction",
                "train.scheduler.min_lr",
            ),
            schedule,
            "`linear`, `cosine`: with a tenth of warmup; `cosine` ends at a tenth of the rate",
        ),
        computed(
            "--apply_gradient_clipping",
            "train.optimizer.gradient_clipping",
            clipping,
            "off: 0",
            default=False,
        ),
        elsewhere("--grad_norm", "train.optimizer.gradient_clipping"),
        none("--save_model", "the result is always saved", True),
        same("--output_dir", "train.output_dir", default="output"),
        computed(
            "--log_to", "train.reporting.to", report_to, "TensorBoard and metrics.jsonl always"
        ),
        computed(
            "--project_name",
            "train.reporting.project",
            lambda value, values: (
                {"train.reporting.project": value} if values.get("--log_to") == "wandb" else {}
            ),
        ),
        computed(
            "--name",
            "train.reporting.name",
            lambda value, values: (
                {"train.reporting.name": value} if values.get("--log_to") == "wandb" else {}
            ),
        ),
        none("--group", "set WANDB_RUN_GROUP in the environment"),
        none("--entity", "set WANDB_ENTITY in the environment"),
        none("--profile_memory", PROFILE),
        none("--profile", PROFILE),
        none("--profiling_output", PROFILE, "profiles"),
        none("--with_stack", PROFILE),
        none("--with_shapes", PROFILE),
        none("--export_trace", PROFILE, True),
        none("--export_memory_timeline", PROFILE),
        none("--wait_steps", PROFILE, 0),
        none("--warmup_steps", PROFILE, 1),
        none("--active_steps", PROFILE, 2),
        none("--repeat", PROFILE, 0),
        none("--profiling_frequency", PROFILE, 10),
    ),
    {
        "train.optimizer.beta1": 0.9,
        "train.optimizer.beta2": 0.95,
        "train.optimizer.eps": 1e-5,
    },
    "betas 0.9 and 0.95, eps 1e-5",
)
