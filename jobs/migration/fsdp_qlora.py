"""fsdp_qlora's flags (AnswerDotAI/fsdp_qlora at 05ed9f2)."""

from headrace.jobs.migration.equivalents import (
    OldSystem,
    choice,
    computed,
    elsewhere,
    none,
    number,
    same,
)
from headrace.jobs.migration.fsdp_qlora_values import (
    bits,
    checkpointing,
    clipping,
    offload,
    report_to,
    schedule,
    targets,
    train_type,
    with_adapter,
)
from headrace.jobs.migration.old_tools import FSDP_QLORA_TOOLS
from headrace.jobs.migration.old_values import if_positive
from headrace.jobs.migration.quantized import BACKEND, TYPE

SHARDING = "the model is cut into stages instead: `pipeline_stages`"
PROFILE = "`profile.trace_step` traces a step, `profile.timeline` every step"
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
        choice(
            "--optimizer",
            "train.optimizer.type",
            {"adamw": "adamw", "adam": "adam"},
        ),
        number("--lr", "train.optimizer.lr", default=1e-5),
        computed(
            "--wd",
            "train.optimizer.weight_decay",
            lambda value, values: (
                {}
                if values.get("--optimizer") == "adam"
                else {"train.optimizer.weight_decay": float(value)}
            ),
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
