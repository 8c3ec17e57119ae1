"""Axolotl's training keys (axolotl-ai-cloud/axolotl 0.19); its data keys are read by `prepare`."""

from typing import Any

from headrace.jobs.migration.equivalents import (
    NoEquivalentError,
    OldSystem,
    Values,
    choice,
    computed,
    elsewhere,
    none,
    number,
    same,
)
from headrace.jobs.migration.qlora_pipe import activation_checkpointing
from headrace.jobs.migration.quantized import INT8, NF4_TWICE, int8, nf4_twice

READ = "read from the YAML file itself: `type` axolotl, `path` the file"
ATTENTION = "attention is chosen by `kernels`, and documents never see each other"
SHARDING = "the model is cut into stages instead: `pipeline_stages`"
ACCELERATION = "`kernels` and `compile` choose what is faster"
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit_paged",
    "lion_32bit": "lion",
    "adafactor": "adafactor",
    "schedule_free_adamw": "adamw_schedule_free",
}


def adapter(value: str, values: Values) -> dict[str, Any]:
    if value not in ("lora", "qlora"):
        raise NoEquivalentError("only lora and qlora have an equivalent")
    return {"train.adapter.kind": "dora" if values.get("peft_use_dora") else "lora"}


def layers(value: Any, _: Values) -> dict[str, Any]:
    numbers = value if isinstance(value, list) else [value]
    return {"train.adapter.layers": ",".join(map(str, numbers))}


def all_linear(value: bool, _: Values) -> dict[str, Any]:
    return {"train.adapter.target_modules": "all-linear"} if value else {}


def in_steps_or_share(steps: str, share: str) -> Any:
    """An integer counts steps, a fraction below 1 is of the run."""

    def convert(value: Any, values: Values) -> dict[str, Any]:
        if isinstance(value, str):
            return {}
        if value >= 1:
            return {steps: int(value)}
        return {share: value * (values.get("num_epochs") or 1)}

    return convert


def times_per_epoch(new: str) -> Any:
    def convert(value: float, _: Values) -> dict[str, Any]:
        return {new: 1 / value}

    return convert


def whole(value: float, values: Values) -> dict[str, Any]:
    if values.get("max_steps"):
        return {}
    if value != int(value):
        raise NoEquivalentError("only whole epochs; give max_steps")
    return {"train.epochs": int(value)}


def computation(dtype: str) -> Any:
    def convert(value: Any, _: Values) -> dict[str, Any]:
        return {"train.dtype": dtype} if value is True or value == "full" else {}

    return convert


def scheduler(value: str, values: Values) -> dict[str, Any]:
    words = {
        "cosine": "cosine",
        "linear": "linear",
        "constant": "constant",
        "constant_with_warmup": "constant",
        "one_cycle": "one_cycle",
    }
    if value not in words:
        raise NoEquivalentError(f"only {', '.join(words)} have an equivalent")
    return {"train.scheduler.type": words[value]}


def min_rate(value: float, values: Values) -> dict[str, Any]:
    return {"train.scheduler.min_lr": float(value) * float(values["learning_rate"])}


def decayed(value: float, _: Values) -> dict[str, Any]:
    return {"train.optimizer.weight_decay": float(value)}


def betas(key: str) -> Any:
    def convert(value: float, values: Values) -> dict[str, Any]:
        return {key: float(value)}

    return convert


def restarts(value: bool, values: Values) -> dict[str, Any]:
    if not value:
        return {}
    steps = values.get("jagged_restart_steps", values.get("relora_steps"))
    if not steps:
        raise NoEquivalentError("without jagged_restart_steps")
    return {"train.relora.every_steps": int(steps)}


def restart_warmup(value: int, values: Values) -> dict[str, Any]:
    return {"train.relora.warmup_steps": int(value)} if values.get("relora") else {}


def reporting(value: Any, values: Values) -> dict[str, Any]:
    services = ["wandb", *(["mlflow"] if values.get("mlflow_tracking_uri") else [])]
    return {"train.reporting.to": services, "train.reporting.project": value}


def preference(value: str, _: Values) -> dict[str, Any]:
    if value == "ipo":
        return {"train.objective.kind": "dpo", "train.objective.loss": "ipo"}
    if value not in ("dpo", "orpo"):
        raise NoEquivalentError("only dpo, ipo and orpo are trained")
    return {"train.objective.kind": value}


DATA_KEYS = (
    "datasets",
    "test_datasets",
    "pretraining_dataset",
    "train_on_inputs",
    "min_sample_len",
    "eot_tokens",
    "chat_template",
    "chat_template_jinja",
    "chat_template_kwargs",
    "default_system_message",
)

AXOLOTL = OldSystem(
    "Axolotl",
    (
        same("base_model", "train.model"),
        none("model_type", "read from config.json", "AutoModelForCausalLM", "LlamaForCausalLM"),
        none("tokenizer_type", "read from the model directory", "AutoTokenizer", "LlamaTokenizer"),
        none("base_model_config", "read from the model directory"),
        none("is_llama_derived_model", "read from config.json", True),
        none("trust_remote_code", "no code of a model directory is run"),
        elsewhere("tokenizer_config", "prepare.tokenizer"),
        same("output_dir", "train.output_dir", default="./model-out"),
        *(elsewhere(key, "prepare.sources.axolotl", READ) for key in DATA_KEYS),
        computed(
            "rl",
            ("train.objective.kind", "train.objective.loss"),
            preference,
            f"`dpo`, `orpo`; also {READ}",
        ),
        number("rl_beta", "train.objective.beta"),
        number("dpo_label_smoothing", "train.objective.label_smoothing"),
        number("rpo_alpha", "train.objective.sft_weight"),
        elsewhere("sequence_len", "prepare.sequence_len", READ),
        elsewhere("sample_packing", "prepare.packing", READ),
        elsewhere("excess_length_strategy", "prepare.overlong", READ),
        elsewhere("val_set_size", "prepare.evaluation_fraction", READ),
        elsewhere("special_tokens", "prepare.special_tokens", READ),
        elsewhere("tokens", "prepare.added_tokens", READ),
        elsewhere("dataset_exact_deduplication", "prepare.deduplicate.exact", READ),
        none("eval_sample_packing", "evaluation is packed like training", True),
        none("pad_to_sequence_len", "nothing is padded on disk", True),
        none("sample_packing_eff_est", "rows are counted when they are written"),
        none("group_by_length", 'rows are packed in place of padded: `loader.pack = "best_fit"`'),
        none("shuffle_merged_datasets", "rows are always shuffled globally", True),
        elsewhere("dataset_prepared_path", "prepare.output"),
        elsewhere("dataset_processes", "headrace prepare --workers"),
        elsewhere("dataset_num_proc", "headrace prepare --workers"),
        computed("adapter", "train.adapter.kind", adapter, "`qlora` too; left out: `none`"),
        same("lora_r", "train.adapter.rank"),
        number("lora_alpha", "train.adapter.alpha"),
        number("lora_dropout", "train.adapter.dropout"),
        same("lora_target_modules", "train.adapter.target_modules"),
        computed("lora_target_linear", "train.adapter.target_modules", all_linear),
        same("lora_target_parameters", "train.adapter.target_parameters"),
        computed("peft_layers_to_transform", "train.adapter.layers", layers),
        same("lora_modules_to_save", "train.adapter.modules_to_save"),
        none("lora_fan_in_fan_out", "known from the model's own layers"),
        elsewhere("peft_use_dora", "train.adapter.kind", '`true`: `"dora"`'),
        same("peft_use_rslora", "train.adapter.rslora"),
        choice(
            "peft_init_lora_weights",
            "train.adapter.init",
            {True: "kaiming", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"},
        ),
        none("lora_model_dir", "training starts from an adapter by merging it first"),
        elsewhere("merge_lora", "headrace merge"),
        computed("load_in_4bit", NF4_TWICE, nf4_twice, "scales quantised again, as there"),
        computed("load_in_8bit", INT8, int8),
        none("bnb_config_kwargs", "write [quantization] by hand"),
        none("lora_on_cpu", "adapters lie beside their weights"),
        none("gptq", "weights of other quantisers are not read"),
        computed("bf16", "train.dtype", computation("bfloat16"), "trained weights are float32"),
        computed("bfloat16", "train.dtype", computation("bfloat16")),
        none("fp16", "float16 is not computed in; use bfloat16"),
        none("float16", "float16 is not computed in; use bfloat16"),
        none("tf32", "PyTorch's own setting", True),
        computed(
            "gradient_checkpointing",
            ("train.activation_checkpointing", "train.activation_offload"),
            activation_checkpointing,
            "`offload`: inputs are held in host memory as well",
        ),
        none("gradient_checkpointing_kwargs", "how layers are computed again is not a choice"),
        none("flash_attention", ATTENTION, True),
        none("sdp_attention", ATTENTION, True),
        none("xformers_attention", ATTENTION, True),
        none("eager_attention", ATTENTION),
        none("attn_implementation", ATTENTION, "flash_attention_2", "sdpa"),
        none("s2_attention", "long contexts are not shortened"),
        none("flash_attn_cross_entropy", ACCELERATION, True),
        none("flash_attn_rms_norm", ACCELERATION, True),
        none("unsloth_cross_entropy_loss", ACCELERATION, True),
        none("lora_mlp_kernel", ACCELERATION, True),
        none("lora_qkv_kernel", ACCELERATION, True),
        none("lora_o_kernel", ACCELERATION, True),
        none("plugins", ACCELERATION),
        same("torch_compile", "train.compile"),
        computed("num_epochs", "train.epochs", whole, default=1),
        same("max_steps", "train.max_steps"),
        same("micro_batch_size", "train.micro_batch_size"),
        none("eval_batch_size", "evaluation uses `micro_batch_size`; results do not depend on it"),
        same("gradient_accumulation_steps", "train.gradient_accumulation_steps"),
        same("seed", "train.seed", default=42),
        number("learning_rate", "train.optimizer.lr"),
        choice("optimizer", "train.optimizer.type", OPTIMIZERS),
        none("optim_args", "`beta1`, `beta2`, `eps` and `weight_decay` have keys"),
        computed("weight_decay", "train.optimizer.weight_decay", decayed, default=0.0),
        computed("adam_beta1", "train.optimizer.beta1", betas("train.optimizer.beta1")),
        computed(
            "adam_beta2", "train.optimizer.beta2", betas("train.optimizer.beta2"), default=0.999
        ),
        computed("adam_epsilon", "train.optimizer.eps", betas("train.optimizer.eps"), default=1e-8),
        number("max_grad_norm", "train.optimizer.gradient_clipping"),
        number("loraplus_lr_ratio", "train.optimizer.lora_plus_ratio"),
        none("loraplus_lr_embedding", "adapters on embeddings take the same ratio"),
        computed("lr_scheduler", "train.scheduler.type", scheduler, default="cosine"),
        none("lr_scheduler_kwargs", "`scheduler` has keys for what it knows"),
        same("warmup_steps", "train.scheduler.warmup_steps"),
        number("warmup_ratio", "train.scheduler.warmup_fraction"),
        computed("cosine_min_lr_ratio", "train.scheduler.min_lr", min_rate, "times the rate"),
        none("cosine_constant_lr_ratio", "a cosine falls to its floor at the end"),
        number("neftune_noise_alpha", "train.regularization.neftune_alpha"),
        computed("relora", "train.relora.every_steps", restarts),
        elsewhere("jagged_restart_steps", "train.relora.every_steps"),
        elsewhere("relora_steps", "train.relora.every_steps"),
        computed("jagged_restart_warmup_steps", "train.relora.warmup_steps", restart_warmup),
        computed("relora_warmup_steps", "train.relora.warmup_steps", restart_warmup),
        none("jagged_restart_anneal_steps", "the rate does not fall before a restart"),
        none("relora_cpu_offload", "weights stay on the device"),
        number("relora_prune_ratio", "train.relora.prune", "the share that is forgotten, as there"),
        computed(
            "eval_steps",
            ("train.evaluation.every_steps", "train.evaluation.every_epochs"),
            in_steps_or_share("train.evaluation.every_steps", "train.evaluation.every_epochs"),
        ),
        computed(
            "evals_per_epoch",
            "train.evaluation.every_epochs",
            times_per_epoch("train.evaluation.every_epochs"),
            "1 over it",
        ),
        none("eval_strategy", "follows from `eval_steps` or `evals_per_epoch`"),
        none("eval_table_size", "`headrace sample --input` answers a file of prompts"),
        computed(
            "save_steps",
            ("train.checkpoint.every_steps", "train.checkpoint.every_epochs"),
            in_steps_or_share("train.checkpoint.every_steps", "train.checkpoint.every_epochs"),
        ),
        computed(
            "saves_per_epoch",
            "train.checkpoint.every_epochs",
            times_per_epoch("train.checkpoint.every_epochs"),
            "1 over it",
        ),
        none("save_strategy", "follows from `save_steps` or `saves_per_epoch`"),
        same("save_total_limit", "train.checkpoint.keep_last", default=4),
        none("save_safetensors", "always safetensors", True),
        none("save_only_model", "a checkpoint is whole; `headrace convert` makes a model of it"),
        same("load_best_model_at_end", "train.checkpoint.keep_best", "kept, not loaded"),
        same("early_stopping_patience", "train.evaluation.patience"),
        same("logging_steps", "train.reporting.every_steps", "every step has its line"),
        elsewhere("resume_from_checkpoint", "headrace train --resume"),
        elsewhere("auto_resume_from_checkpoints", "headrace train --resume"),
        none("loss_watchdog_threshold", "`anomalies.spike_factor` compares with the last steps"),
        none("loss_watchdog_patience", "`anomalies.spike_factor` compares with the last steps"),
        computed("wandb_project", ("train.reporting.to", "train.reporting.project"), reporting),
        none("wandb_entity", "set WANDB_ENTITY in the environment"),
        none("wandb_watch", "weights are not sent"),
        same("wandb_name", "train.reporting.name"),
        none("wandb_log_model", "models are not sent", "false"),
        computed(
            "mlflow_tracking_uri",
            "train.reporting.to",
            lambda value, values: (
                {} if values.get("wandb_project") else {"train.reporting.to": ["mlflow"]}
            ),
            "the address itself: MLFLOW_TRACKING_URI in the environment",
        ),
        same("mlflow_experiment_name", "train.reporting.project"),
        none("use_tensorboard", "always", True),
        none("deepspeed", SHARDING),
        none("fsdp", SHARDING),
        none("fsdp_config", SHARDING),
        none("fsdp_version", SHARDING),
        none("context_parallel_size", "sequences are not cut", 1),
        none("sequence_parallel_degree", "sequences are not cut", 1),
        none("tensor_parallel_size", SHARDING, 1),
        none("local_rank", "set by the launcher"),
        none("strict", "an unknown key is always an error"),
        none("debug", "`headrace inspect` shows rows"),
    ),
    {"train.adapter.kind": "none"},
    "full fine-tuning unless `adapter` is given",
)
