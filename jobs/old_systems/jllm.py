"""jllm's flags (janelu9/flash-finetuning at 75d90eb): data preparation and `train_pipe`."""

from typing import Any

from headrace.jobs.old_systems.command_lines import JLLM_TOOLS
from headrace.jobs.old_systems.equivalents import (
    NoEquivalentError,
    OldSystem,
    Values,
    computed,
    elsewhere,
    exact_choice,
    if_positive,
    keep,
    none,
    number,
    same,
    warmup,
)


def accumulation(value: int, values: Values) -> dict[str, Any]:
    """0 asks to derive it from the global batch; the replicas are not in the command line."""
    if not value:
        rows = values.get("--global_batch_size", 1)
        value = max(1, rows // values.get("--per_device_train_batch_size", 1))
    return {"train.gradient_accumulation_steps": value}


def partition(value: str, _: Values) -> dict[str, Any]:
    words = {"fast": "cost", "mem": "memory", "uniform": "uniform"}
    if value not in words:
        raise NoEquivalentError("numbers there count half layers; list whole layers in `partition`")
    return {"train.partition": words[value]}


def lora(value: int, _: Values) -> dict[str, Any]:
    return {"train.adapter.kind": "lora", "train.adapter.rank": value} if value else {}


def frozen_or_full(value: bool, values: Values) -> dict[str, Any]:
    if values.get("--lora_dim") and not value:
        raise NoEquivalentError(
            "embedding, norms and head beside adapters: name them in adapter.modules_to_save"
        )
    return {}


def modules(value: str, values: Values) -> dict[str, Any]:
    """Fused names of theirs are the model's own names here."""
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    names = [name for part in value.split(",") for name in fused.get(part, [part])]
    return {"train.adapter.target_modules": names} if values.get("--lora_dim") else {}


def recompute(value: int, values: Values) -> dict[str, Any]:
    """Segments of so many layers keep one input each; here a layer is the largest segment."""
    return {"train.activation_checkpointing": "full" if value else "none"}


def background(value: str, _: Values) -> dict[str, Any]:
    return {"train.checkpoint.background": value in ("process", "thread")}


def random_weights(value: bool, _: Values) -> dict[str, Any]:
    return {"train.weights": "random"} if value else {}


def shuffle(value: bool, _: Values) -> dict[str, Any]:
    return {"train.loader.shuffle": not value}


def packed(value: bool, values: Values) -> dict[str, Any]:
    whole = bool(values.get("raw2ids --image_path"))
    return {"prepare.packing": "best_fit" if whole else "concatenate"} if value else {}


def pictured(value: str, values: Values) -> dict[str, Any]:
    model = values.get("raw2ids --tokenizer")
    return {"prepare.images.folder": value, "prepare.images.model": model} if value else {}


IMAGES = "text only"


TRAINED = "trained weights only; `headrace convert` makes an adapter or a model of them"


RAW2IDS = (
    elsewhere("raw2ids -t", "prepare.sources.type", "`ft`: `chat`; others: `text`, `documents`"),
    elsewhere("raw2ids -i", "prepare.sources.path"),
    elsewhere("raw2ids -o", "prepare.output"),
    none("raw2ids -n", "work is cut by `block_bytes`, and finished blocks are kept"),
    none("raw2ids -c", "shards are always zstd", "zstd", "gzip"),
    none("raw2ids --batch_size", "row groups are cut by `row_group_tokens`"),
    same("raw2ids --max_len", "prepare.sequence_len", default=2048),
    elsewhere("raw2ids --cores", "headrace prepare --workers"),
    same("raw2ids --tokenizer", "prepare.tokenizer", "a directory with tokenizer.json"),
    computed(
        "raw2ids --stack",
        "prepare.packing",
        packed,
        'off: `"none"`, without padding; documents that are too long are split, not cut',
    ),
    none("raw2ids --pad", "nothing is padded on disk"),
    none("raw2ids --filter", "rows without a trained token add nothing to a loss by tokens"),
    computed(
        "raw2ids --image_path",
        ("prepare.images.folder", "prepare.images.model"),
        pictured,
        "the model's directory is that of the tokenizer; documents are not cut",
    ),
    elsewhere("raw2ids --max_pixels", "prepare.images.processor", "`{max_pixels = ...}`"),
    elsewhere("raw2ids --max_num", "prepare.images.processor", "`{max_patches = ...}`"),
    none("raw2ids --tmp", "no scratch directory is needed; it is beside the output"),
    none("raw2ids -T", "processes; the tokenizer leaves the interpreter's lock by itself"),
    none("raw2ids -C", "remove the output directory"),
)


JLLM = OldSystem(
    "jllm",
    (
        *RAW2IDS,
        *JLLM_TOOLS,
        same("--model", "train.model"),
        none("--from_ckpt", "`model` may be any model directory, such as one that was exported"),
        elsewhere("--resume_ckpt", "headrace train --resume"),
        elsewhere("--only_load_model", "headrace convert", "a model to start from"),
        elsewhere("--tag", "headrace convert --step"),
        computed("--init", "train.weights", random_weights),
        none("--cache_model", "each process reads its own part of the model; nothing is cached"),
        none("--only_cache_model", "each process reads its own part of the model"),
        same("--output_dir", "train.output_dir"),
        none("--no_safetensor", "weights are always safetensors"),
        elsewhere("--train_data", "train.datasets.path", "their Parquet: `headrace index` first"),
        elsewhere("--eval_data", "train.evaluation_datasets.path"),
        none("--img_shm", IMAGES),
        none("--seq_len", "the shards say it", 2048),
        none("--block_mask", "documents never see each other", True),
        none("--num_workers", "one thread reads ahead: `loader.prefetch_batches`"),
        computed("--no_shuf", "train.loader.shuffle", shuffle),
        none("--dist_data", "each replica reads its own rows of one set, or give each node a copy"),
        none("--no_pin_memory", "memory is pinned on GPUs"),
        none("--skip_train_steps", "`anomalies` skips steps that go wrong"),
        same("--pipe_parallel_size", "train.pipeline_stages"),
        same("--model_parallel_size", "train.tensor_parallel"),
        same("--sequence_parallel_size", "train.sequence_parallel"),
        none("--encoder_pipe_parallel_size", IMAGES, 0),
        none("--attention_alpha", "the cost of a layer is counted from its shape", 3),
        computed(
            "--partition_method", "train.partition", partition, "`fast`: `cost`, `mem`: `memory`"
        ),
        none("--multi_layerspec", "how a stage is built inside"),
        same("--split_dlayer", "train.half_layers"),
        none("--num_layers_per_decoder", "a layer stays whole"),
        none("--emb_partitions", "embedding and head stay whole", 1),
        none("--async_tensor_model_parallel_allreduce", "sums are waited for where they are used"),
        none("--zero_stage", "1: `optimizer.shard`; weights and gradients stay whole", 0),
        none("--offload", "nothing is moved to the host", False),
        none("--timeout", "30 minutes", 1800),
        none("--ds_config", "the keys of train.toml say all"),
        elsewhere("--local_rank", "headrace train", "set by the launcher"),
        same("--num_train_epochs", "train.epochs"),
        same("--per_device_train_batch_size", "train.micro_batch_size"),
        elsewhere("--global_batch_size", "train.gradient_accumulation_steps", "over the replicas"),
        computed(
            "--gradient_accumulation_steps",
            "train.gradient_accumulation_steps",
            accumulation,
            "0, or left out: the global batch over `micro_batch_size`, for one replica",
            default=0,
        ),
        number("--weight_decay", "train.optimizer.weight_decay", default=0),
        exact_choice(
            "--lr_scheduler_type",
            "train.scheduler.type",
            {
                "cosine": "cosine",
                "linear": "linear",
                "constant": "constant",
                "constant_with_warmup": "constant",
            },
            default="cosine",
        ),
        computed(
            "--num_warmup_steps",
            ("train.scheduler.warmup_steps", "train.scheduler.warmup_fraction"),
            warmup("--num_train_epochs"),
            "below 1 it is a share of an epoch there, of all steps here",
        ),
        number("--learning_rate", "train.optimizer.lr", default=3e-4),
        same("--seed", "train.seed", default=1234),
        computed(
            "--checkpoint_grad_interval",
            "train.activation_checkpointing",
            recompute,
            'above 0: `"full"`, each layer by itself',
        ),
        none("--no_checkpoint_grad_step", "every step is checkpointed alike", 1000000),
        none("--checkpoint", "checkpoints lie in `output_dir`"),
        computed(
            "--steps_per_checkpoint",
            "train.checkpoint.every_steps",
            if_positive("train.checkpoint.every_steps"),
        ),
        computed(
            "--background_executor",
            "train.checkpoint.background",
            background,
            default="none",
        ),
        none("--ckpt_step_gt", "the rule of intervals holds from the start", 0),
        computed(
            "--best_of",
            "train.checkpoint.keep_best",
            lambda value, _: {"train.checkpoint.keep_best": value > 0},
            "one best is kept",
        ),
        none("--ckpt_epoch", "`checkpoint.every_epochs` is an interval"),
        none("--skip_epoch", "`epochs` counts whole passes"),
        computed("--max_num_checkpoints", "train.checkpoint.keep_last", keep),
        same("--only_ckpt_model", "train.checkpoint.weights_only", TRAINED),
        same("--only_ckpt_lora", "train.checkpoint.weights_only", TRAINED),
        computed(
            "--early_stop", "train.evaluation.patience", if_positive("train.evaluation.patience")
        ),
        computed(
            "--steps_per_eval",
            "train.evaluation.every_steps",
            if_positive("train.evaluation.every_steps"),
        ),
        none("--steps_per_print", "each step is printed", 1),
        computed(
            "--lora_dim", ("train.adapter.kind", "train.adapter.rank"), lora, "0: full fine-tuning"
        ),
        computed(
            "--lora_alpha",
            "train.adapter.alpha",
            lambda value, values: (
                {"train.adapter.alpha": float(value)} if values.get("--lora_dim") else {}
            ),
            default=1,
        ),
        computed(
            "--lora_module_name",
            "train.adapter.target_modules",
            modules,
            "fused names are taken apart",
            default="qkv_proj,o_proj,gate_up_proj,down_proj",
        ),
        computed(
            "--only_optimize_lora",
            "train.adapter.modules_to_save",
            frozen_or_full,
            "without it: name what else is trained",
            default=True,
        ),
    ),
    {
        "train.adapter.kind": "none",
        "train.optimizer.beta1": 0.9,
        "train.optimizer.beta2": 0.95,
        "train.optimizer.gradient_clipping": 1.0,
    },
    "betas 0.9 and 0.95, clipping at 1; no adapter unless `--lora_dim` is given",
)
