"""qlora-pipe-lite's keys (jukofyork/qlora-pipe-lite at e8e5092)."""

from typing import Any

from headrace.jobs.old_systems.command_lines import QLORA_PIPE_LITE_TOOLS
from headrace.jobs.old_systems.equivalents import (
    OldSystem,
    Values,
    choice,
    computed,
    elsewhere,
    none,
    number,
    same,
    share_of_epoch,
)
from headrace.jobs.old_systems.qlora_pipe import NEIGHBORS
from headrace.jobs.old_systems.quantized import BACKEND, TYPE, nf4


def adapter_kind(full: bool, values: Values) -> dict[str, Any]:
    kind = "none" if full else "control" if values.get("use_control_adapters") else "lora"
    found = {"train.adapter.kind": kind}
    return found | ({"train.optimizer.type": "adamw_kahan"} if full else {})


def layers(value: int | str, _: Values) -> dict[str, Any]:
    return {"train.adapter.layers": str(value).replace(" ", "")}


def minutes(value: float, _: Values) -> dict[str, Any]:
    return {"train.checkpoint.every_minutes": 60.0 * value}


def mask(value: Any, _: Values) -> dict[str, Any]:
    whole = value is True or isinstance(value, list)
    return {"prepare.sources.mask_tokens": value if whole else [value]}


def decay(value: float, values: Values) -> dict[str, Any]:
    control = values.get("use_control_adapters")
    key = "train.adapter.control_decay" if control else "train.regularization.product_decay"
    return {key: float(value)} if value else {}


def gamma(value: float, values: Values) -> dict[str, Any]:
    return {"train.adapter.gamma": float(value)} if values.get("use_control_adapters") else {}


QLORA_PIPE_LITE = OldSystem(
    "qlora-pipe-lite",
    (
        elsewhere("--config", "headrace train"),
        elsewhere("--resume_from_checkpoint", "headrace train --resume"),
        elsewhere("--local_rank", "headrace train", "set by the launcher"),
        elsewhere("--add-prefix-space", "prepare.sources.add_prefix_space"),
        none("--trust-remote-code", "no code of a model directory is run"),
        none("--deepspeed", "not needed"),
        none("--deepspeed_config", "the batch is set by the keys of train.toml alone"),
        *QLORA_PIPE_LITE_TOOLS,
        same("model_dir", "train.model"),
        same("output_dir", "train.output_dir"),
        number("lr", "train.optimizer.lr"),
        same("sequence_len", "prepare.sequence_len", "need not be a multiple of 64"),
        computed(
            "full_fine_tune",
            ("train.adapter.kind", "train.optimizer.type"),
            adapter_kind,
            '`true`: `"none"`, with `adamw_kahan`',
            default=False,
        ),
        elsewhere("use_control_adapters", "train.adapter.kind", '`true`: `"control"`'),
        computed("control_adapter_gamma", "train.adapter.gamma", gamma),
        computed("load_in_4bit", (BACKEND, TYPE), nf4),
        same("lora_rank", "train.adapter.rank"),
        number("lora_dropout", "train.adapter.dropout"),
        none("lora_weight_dtype", "adapters are float32, unless `adamw_kahan` is used", "float32"),
        computed(
            "lora_weight_decay",
            ("train.regularization.product_decay", "train.adapter.control_decay"),
            decay,
            "decay of BA, or of control adapters' log stretches",
        ),
        same("target_modules", "train.adapter.target_modules"),
        computed("layers_to_transform", "train.adapter.layers", layers),
        number("beta1", "train.optimizer.beta1"),
        number("beta2", "train.optimizer.beta2"),
        number("eps", "train.optimizer.eps"),
        same("epochs", "train.epochs"),
        same("gradient_accumulation_steps", "train.gradient_accumulation_steps"),
        none(
            "eval_gradient_accumulation_steps",
            "evaluation fills the pipeline by itself; results do not depend on it",
        ),
        same("pipeline_stages", "train.pipeline_stages"),
        choice(
            "partition_method",
            "train.partition",
            {"uniform": "uniform", "parameters": "memory"},
            "classes cannot be named; list the layers of each stage",
            default="uniform",
        ),
        NEIGHBORS,
        number(
            "eval_fraction",
            "prepare.evaluation_fraction",
            "of documents, before they are cut",
            default=0.01,
        ),
        computed(
            "evals_per_epoch",
            "train.evaluation.every_epochs",
            share_of_epoch("train.evaluation.every_epochs"),
            "1 over it",
            default=10,
        ),
        computed(
            "checkpoint_interval_hours",
            "train.checkpoint.every_minutes",
            minutes,
            "60 times it",
        ),
        same("max_checkpoints", "train.checkpoint.keep_last"),
        same("max_sequences", "prepare.max_rows", "a random sample of the rows"),
        same("drop_tails", "prepare.drop_tails"),
        same("mix_datasets", "prepare.mix_sources"),
        same(
            "sequence_prefix",
            "prepare.sequence_prefix",
            "there BOS if left out, here nothing: give the text of BOS",
        ),
        same("document_prefix", "prepare.sources.document_prefix", default=""),
        same("document_suffix", "prepare.sources.document_suffix"),
        computed("mask_tokens", "prepare.sources.mask_tokens", mask, "ids, or `true`"),
        elsewhere("datasets[].dataset_path", ("prepare.sources.path", "prepare.sources.type")),
        elsewhere(
            "datasets[].control_class",
            "prepare.sources.control_class",
        ),
        elsewhere(
            "datasets[].max_tokens",
            ("train.datasets.max_tokens", "prepare.sources.max_tokens"),
            "the second for several datasets; not with `mix_datasets`",
        ),
    ),
    {
        "train.optimizer.weight_decay": 0.0,
        "train.scheduler.type": "rms_ratio",
        "train.activation_checkpointing": "full",
        "train.checkpoint.every_epochs": 1.0,
    },
    "no weight decay, the RMS-ratio schedule, activation checkpointing, a checkpoint each epoch",
)
