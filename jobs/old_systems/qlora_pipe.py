"""qlora-pipe's keys (tdrussell/qlora-pipe at 90b8e7d)."""

from headrace.jobs.old_systems.command_lines import QLORA_PIPE_TOOLS
from headrace.jobs.old_systems.equivalents import (
    Equivalent,
    OldSystem,
    activation_checkpointing,
    choice,
    computed,
    elsewhere,
    exact_choice,
    keep,
    none,
    number,
    same,
    warmup,
)
from headrace.jobs.old_systems.qlora_pipe_values import (
    SAMPLING,
    adapter_dtype,
    adapter_kind,
    computed_dtype,
    gamma,
    loraplus,
    rejected_sampling,
    tokens_per_batch,
    weight_offload,
)
from headrace.jobs.old_systems.quantized import QUANTIZED

COMMAND_LINE = (
    elsewhere("--config", "headrace train"),
    elsewhere("--resume_from_checkpoint", "headrace train --resume"),
    elsewhere("--local_rank", "headrace train", "set by the launcher"),
    elsewhere("--debug_dataset", "headrace inspect --rows"),
    none(
        "--no_quantiles",
        "evaluations have quantiles; training steps do with `reporting.token_statistics_every`",
    ),
    none("--deepspeed", "not needed"),
    none("--deepspeed_config", "the batch is set by the keys of train.toml alone"),
)

NEIGHBORS = choice(
    "use_column_major_topology",
    "train.neighbors",
    {True: "stages", False: "replicas"},
    "stages of a replica are neighbors if nothing is said",
)
LAYERS: tuple[Equivalent, ...] = (
    none(
        "attn_implementation",
        "attention is chosen by `kernels`: ours on GPUs, PyTorch's elsewhere",
        "flash_attention_2",
        "sdpa",
    ),
    computed(
        "offload_mlp_to_cpu",
        "train.weight_offload",
        weight_offload,
        '`true`: `"mlp"`; a number of experts: `"experts"`, all of them; without checkpointing too',
    ),
    none("load_in_4bit", "never read by qlora-pipe itself"),
)

DATASETS = tuple(
    row
    for table in ("datasets", "eval_datasets")
    for row in (
        elsewhere(f"{table}[].name", "prepare.sources.name"),
        elsewhere(
            f"{table}[].dataset_type",
            ("prepare.sources.type", "prepare.packing"),
            "`textfile`: `text`, `doclist`: `documents`, concatenated; "
            "`axolotl`, `pretokenized`: rows that are not packed",
        ),
        elsewhere(f"{table}[].dataset_path", "prepare.sources.path"),
        elsewhere(f"{table}[].sequence_len", "prepare.sequence_len"),
        elsewhere(f"{table}[].num_repeats", "train.datasets.repeats"),
        elsewhere(
            f"{table}[].sample_weight", "train.datasets.weight", "with interleaving, as there"
        ),
        elsewhere(
            f"{table}[].eval_size",
            ("prepare.evaluation_fraction", "prepare.evaluation_documents"),
            "below 1 a share; documents are split before they become rows",
        ),
        elsewhere(f"{table}[].subsample", "prepare.sources.sample_fraction", "chosen by content"),
    )
)

QLORA_PIPE = OldSystem(
    "qlora-pipe",
    (
        *COMMAND_LINE,
        *QLORA_PIPE_TOOLS,
        same("model", "train.model"),
        same("output_dir", "train.output_dir", "the run directory itself, without a time stamp"),
        computed(
            "full_fine_tune",
            "train.adapter.kind",
            adapter_kind,
            '`true`: `"none"`; tied embeddings may be trained',
            default=False,
        ),
        elsewhere("use_dora", "train.adapter.kind", '`true`: `"dora"`'),
        same("lora_rank", "train.adapter.rank"),
        number("lora_alpha", "train.adapter.alpha"),
        number("lora_dropout", "train.adapter.dropout"),
        same("target_modules", "train.adapter.target_modules"),
        same("modules_to_save", "train.adapter.modules_to_save", "embedding and head are trained"),
        same("layers_to_transform", "train.adapter.layers"),
        computed(
            "model_weight_dtype", "train.dtype", computed_dtype, "the type of the computation too"
        ),
        computed(
            "lora_weight_dtype",
            "train.dtype",
            adapter_dtype,
            "adapters are float32; with `adamw_kahan` they are of `dtype`",
        ),
        choice(
            "save_dtype",
            "train.checkpoint.save_dtype",
            {name: name for name in ("float32", "bfloat16", "float16")},
            "default there: as trained",
        ),
        same("epochs", "train.epochs"),
        exact_choice(
            "lr_scheduler",
            "train.scheduler.type",
            {"constant": "constant", "none": "constant", "cosine": "cosine"},
        ),
        computed(
            "warmup_steps",
            ("train.scheduler.warmup_steps", "train.scheduler.warmup_fraction"),
            warmup("epochs"),
            "below 1 it is a share of an epoch there, of all steps here",
        ),
        number("force_constant_lr", "train.scheduler.force_constant_lr"),
        none("load_optimizer_states", "always loaded; they take no more memory than before", True),
        same("micro_batch_size_per_gpu", "train.micro_batch_size"),
        computed(
            "batch_size_tokens",
            ("train.loader.pack", "train.loader.tokens_per_row", "train.micro_batch_size"),
            tokens_per_batch,
            "places of so many tokens, filled with whole rows instead of padding",
        ),
        same("gradient_accumulation_steps", "train.gradient_accumulation_steps"),
        none(
            "eval_gradient_accumulation_steps",
            "evaluation fills the pipeline by itself; results do not depend on it",
            1,
        ),
        number("gradient_clipping", "train.optimizer.gradient_clipping"),
        none("steps_per_print", "each step is printed", 1),
        same("pipeline_stages", "train.pipeline_stages"),
        NEIGHBORS,
        none("group_by_length", 'rows are packed in place of padded: `loader.pack = "best_fit"`'),
        computed(
            "activation_checkpointing",
            ("train.activation_checkpointing", "train.activation_offload"),
            activation_checkpointing,
            '`true`: `"full"`; `"cpu"`, `"unsloth"`: inputs are held in host memory as well',
        ),
        *LAYERS,
        number("scale_weight_norms", "train.regularization.max_product_norm"),
        number("load_balancing_loss_coef", "train.router_loss"),
        choice(
            "loss_type",
            "train.objective.kind",
            {
                "cross_entropy_loss": None,
                "focal_loss": "focal",
                "focal_loss_star": "focal_star",
                "inverse_focal_loss": "inverse_focal",
                "exponentiated_cross_entropy_loss": "exponentiated",
            },
        ),
        computed(
            "focal_loss_gamma",
            "train.objective.gamma",
            gamma,
            "0, their default, divides by zero in `focal_loss_star`; it must be given here",
        ),
        same("eval_steps", "train.evaluation.every_steps"),
        same("logging_steps", "train.reporting.every_steps", "every step has its line"),
        same("eval_before_first_step", "train.evaluation.before_first_step", default=False),
        same("eval_after_last_step", "train.evaluation.after_last_step", default=False),
        same(
            "save_steps",
            "train.checkpoint.every_steps",
            "a checkpoint; `headrace convert` makes an adapter or a model of any",
        ),
        number(
            "save_every_n_epochs", "train.checkpoint.every_epochs", "a checkpoint too", default=1
        ),
        none("save_checkpoint_on_epoch_end", "checkpoints go by `save_every_n_epochs` here", True),
        number("checkpoint_every_n_minutes", "train.checkpoint.every_minutes"),
        none("checkpoint_on_save", "each save is a checkpoint", True),
        computed(
            "keep_states",
            "train.checkpoint.keep_last",
            keep,
            "of earlier sessions too; -1 keeps all",
        ),
        elsewhere("resume_from_checkpoint", "headrace train --resume"),
        computed(
            "rejected_sampling",
            SAMPLING.values(),
            rejected_sampling,
            "a table of its own. Answers there end at twice the longest prompt; here each ends "
            "by itself, or at its own limit",
        ),
        elsewhere("rejected_sampling_max_new_tokens", "train.rejected_sampling.max_new_tokens"),
        same("dataset_combination_mode", "train.mixing"),
        computed(
            "dataset_interleave_stopping_strategy",
            "train.mixing_stop",
            lambda value, values: (
                {"train.mixing_stop": value}
                if values.get("dataset_combination_mode") == "interleave"
                else {}
            ),
        ),
        *QUANTIZED,
        exact_choice(
            "optimizer.type",
            "train.optimizer.type",
            {"adamw": "adamw", "adamw8bit": "adamw_8bit", "adamw_kahan": "adamw_kahan"},
        ),
        number("optimizer.lr", "train.optimizer.lr"),
        number("optimizer.beta1", "train.optimizer.beta1"),
        number("optimizer.beta2", "train.optimizer.beta2"),
        number("optimizer.weight_decay", "train.optimizer.weight_decay", "not of norms and biases"),
        number("optimizer.eps", "train.optimizer.eps"),
        number("optimizer.lr_min", "train.scheduler.min_lr"),
        none("optimizer.kahan_sum", "`adamw_kahan` always sums so", True),
        computed("optimizer.use_loraplus", "train.optimizer.lora_plus_ratio", loraplus),
        elsewhere("optimizer.loraplus_lr_ratio", "train.optimizer.lora_plus_ratio"),
        choice("rl.method", "train.objective.kind", {"dpo": "dpo"}),
        number("rl.dpo_beta", "train.objective.beta"),
        *(
            elsewhere(old, new, "of rejected answers, with `rejected_sampling`")
            for old, new in SAMPLING.items()
            if old.startswith("sampling.")
        ),
        *DATASETS,
    ),
    {},
)
