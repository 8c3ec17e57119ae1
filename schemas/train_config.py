"""The config of `headrace train`."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from headrace.schemas.layer_ranges import parse_layers
from headrace.schemas.toml_config import Config, Text


class DatasetConfig(Config):
    """One `[[datasets]]` table: a shard directory's train split."""

    path: Text = Field(description="Shard directory, or its URL: s3://, gs://, hf://, file://.")
    weight: float = Field(
        1.0, gt=0, description='Share in the mixture, relative to the others; `"interleave"` only.'
    )
    repeats: int = Field(1, ge=1, description="Times that each of its rows comes in an epoch.")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens it gives in an epoch, in whole rows of its mean length; "
        "the next epoch takes the next rows. Default: all.",
    )


class EvaluationDatasetConfig(Config):
    """One `[[evaluation_datasets]]` table: a shard directory's evaluation split."""

    path: Text = Field(description="Shard directory, or its URL: s3://, gs://, hf://, file://.")
    name: Text | None = Field(None, description="Name in logs. Default: the directory's name.")
    max_rows: int | None = Field(None, ge=1, description="Use only the first rows. Default: all.")


# adapter kind -> settings that would be passed over
NOT_WITH = {
    "none": ("modules_to_save", "target_parameters"),
    "blocks": ("modules_to_save", "target_parameters", "layers"),
}


class AdapterConfig(Config):
    """`[adapter]`."""

    kind: Literal["lora", "dora", "blocks", "none"] = Field(
        "lora",
        description='`"lora"`: low-rank adapters over frozen weights. `"dora"`: these with '
        'magnitudes apart. `"blocks"`: new decoder layers between the frozen ones. `"none"`: train '
        "the weights themselves.",
    )
    rank: int = Field(16, ge=1, description="Rank of the LoRA matrices.")
    alpha: float | None = Field(
        None, gt=0, description="LoRA scale is alpha / rank. Default: the rank, scale 1."
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = Field(
        "kaiming",
        description="What adapters start from. The first two start at no change; "
        '`"pissa"` and `"olora"` take the principal part of each weight over, by singular values '
        "or by QR.",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    target_modules: Literal["all-linear"] | list[Text] = Field(
        "all-linear",
        description='`"all-linear"` (the head left out), or names such as `["q_proj", "v_proj"]`; '
        '`"embed_tokens"` and `"lm_head"` can have adapters as well. With `kind = "none"`: train '
        "only weights with one of these in their name.",
    )
    target_parameters: Literal["experts"] | list[Text] = Field(
        [],
        description='Fused weights of experts that get adapters: `"experts"`, or PEFT\'s names '
        'such as `["mlp.experts.down_proj"]`.',
    )
    layers: Text | None = Field(
        None,
        description='Decoder layers that are trained, such as `"0:15,20"`; ends count. '
        "Default: all.",
    )
    modules_to_save: list[Text] = Field(
        [], description='Modules trained in full beside the adapters, such as `["lm_head"]`.'
    )
    blocks: int = Field(8, ge=1, description='New decoder layers, with `kind = "blocks"`.')

    @field_validator("layers")
    @classmethod
    def check_layers(cls, value: str | None) -> str | None:
        if value is not None:
            parse_layers(value)
        return value

    @model_validator(mode="after")
    def check(self) -> "AdapterConfig":
        taken = self.init in ("pissa", "olora")
        if taken and self.kind == "dora":
            raise ValueError(f'init = "{self.init}" does not go with kind = "dora"; choose one')
        if self.target_parameters and self.kind == "dora":
            raise ValueError('target_parameters do not go with kind = "dora"; use kind = "lora"')
        if self.target_parameters and self.dropout:
            raise ValueError(
                f"dropout = {self.dropout} does not go with target_parameters; set it to 0"
            )
        if self.target_parameters and taken:
            raise ValueError(f'init = "{self.init}" does not go with target_parameters')
        for key in NOT_WITH.get(self.kind, ()):
            if getattr(self, key):
                raise ValueError(f'{key} has no meaning with kind = "{self.kind}"; drop it')
        return self


class OptimizerConfig(Config):
    """`[optimizer]`."""

    type: Literal["adamw", "adamw_kahan"] = Field(
        "adamw",
        description='`"adamw"`: trained weights, gradients and states in float32. `"adamw_kahan"`: '
        "all in `dtype`, with Kahan summation; 10 bytes a weight in bfloat16 instead of 16.",
    )
    lr: float = Field(gt=0, description="Peak learning rate.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-6, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(
        0.01, ge=0, description="Decoupled decay; not applied to norms and biases."
    )
    lora_plus_ratio: float = Field(
        1.0, gt=0, description="Learning rate of the adapters' B over that of A (LoRA+)."
    )
    gradient_clipping: float = Field(
        1.0, ge=0, description="Largest norm of the whole gradient; 0 turns clipping off."
    )


class SchedulerConfig(Config):
    """`[scheduler]`."""

    type: Literal["constant", "linear", "cosine", "one_cycle", "rms_ratio"] = Field(
        "constant",
        description="Learning rate after warmup. `linear` and `cosine` fall to `min_lr`; "
        "`one_cycle` rises by half a cosine from lr / 25 over the warmup (default: 30% of the "
        "steps) and falls to `min_lr`, at least lr / 250,000; `rms_ratio` follows the settling of "
        "Adam's second moment, lr * sqrt((1 - beta2^t) / (1 + beta2^t)), and needs no horizon.",
    )
    warmup_steps: int = Field(
        0, ge=0, description="Steps of linear warmup; the first runs at lr / warmup_steps."
    )
    warmup_fraction: float | None = Field(
        None, gt=0, lt=1, description="Warmup as a share of all steps, instead of `warmup_steps`."
    )
    min_lr: float = Field(0.0, ge=0, description="Where falling schedules end.")
    force_constant_lr: float | None = Field(
        None,
        gt=0,
        description="This rate, whatever the other keys say; may be set when a run is resumed.",
    )

    @property
    def has_horizon(self) -> bool:
        """Whether the rate of a step depends on how many steps there will be."""
        if self.force_constant_lr is not None:
            return False
        return self.type not in ("constant", "rms_ratio") or self.warmup_fraction is not None

    @model_validator(mode="after")
    def check_warmup(self) -> "SchedulerConfig":
        if self.warmup_steps and self.warmup_fraction is not None:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} and warmup_fraction = {self.warmup_fraction} "
                "exclude each other; keep one"
            )
        return self


class EvaluationConfig(Config):
    """`[evaluation]`."""

    before_first_step: bool = Field(True, description="Evaluate before training starts.")
    every_steps: int | None = Field(
        None, ge=1, description="Evaluate every so many steps. Default: never in between."
    )
    every_epochs: float | None = Field(
        None, gt=0, description="Evaluate every so many epochs; 0.1 is ten times an epoch."
    )
    after_last_step: bool = Field(True, description="Evaluate when training is done.")
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop early after so many evaluations in a row that find no new lowest loss "
        "(over all sets, weighted by tokens). Default: never.",
    )


class CheckpointConfig(Config):
    """`[checkpoint]`."""

    every_steps: int | None = Field(None, ge=1, description="Checkpoint every so many steps.")
    every_epochs: float | None = Field(None, gt=0, description="Checkpoint every so many epochs.")
    every_minutes: float | None = Field(60, gt=0, description="Checkpoint every so many minutes.")
    keep_last: int = Field(
        3, ge=1, description="Older ones are removed, after a newer one is durable."
    )
    at_end: bool = Field(
        True,
        description="`false`: a trial run that leaves neither checkpoint nor result at its end.",
    )
    keep_best: bool = Field(
        False,
        description="Also save after each evaluation that finds a new lowest loss, "
        "and keep that checkpoint whatever its age.",
    )
    background: bool = Field(
        True,
        description="Write while the next steps run, from a copy in host memory of the trained "
        "weights and optimiser states. `false`: training waits, without the copy.",
    )


class AnomalyConfig(Config):
    """`[anomalies]`."""

    on_not_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="When the gradient of a step is NaN or infinite: stop before anything is "
        "updated, or skip the update and go on.",
    )
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="A loss above so many times the mean of the last `spike_window` steps is a "
        "spike. Default: none is.",
    )
    spike_window: int = Field(20, ge=2, description="Steps that a spike is compared with.")
    on_spike: Literal["continue", "skip", "stop"] = Field(
        "skip", description="After a spike: only note it, skip the update, or stop before it."
    )

    @property
    def losses_kept(self) -> int:
        """How many losses a run must remember."""
        return self.spike_window if self.spike_factor is not None else 0


Overlong = Literal["error", "truncate", "drop"]


class LoaderConfig(Config):
    """`[loader]`."""

    prefetch_batches: int = Field(
        2, ge=0, description="Global batches read ahead by the first stage; 0 reads in line."
    )
    shuffle: bool = Field(
        True,
        description="Another order each epoch. `false`: shard order, shuffled once already.",
    )
    shuffle_window: int = Field(4, ge=1, description="Row groups that are held and mixed at once.")
    pack: Literal["none", "best_fit"] = Field(
        "none",
        description='`"best_fit"`: put several short rows into each place of a micro-batch, as '
        "documents that do not see each other. Evaluation too.",
    )
    tokens_per_row: int | None = Field(
        None,
        ge=2,
        description="Tokens of a place when packing. Default: the largest `sequence_len` of the "
        "datasets.",
    )
    look_ahead: int = Field(256, ge=1, description="Rows to choose from when packing.")
    overlong: Overlong = Field(
        "error",
        description='Rows with more than `tokens_per_row`. `"error"`: shards that may have some '
        'are refused. `"truncate"`: cut. `"drop"`: left out. They are counted in the metrics.',
    )
    prefetch_bytes: int = Field(
        1 << 28, ge=0, description="Most bytes of batches read ahead, one batch apart from that."
    )
    verify: Literal["full", "size", "off"] = Field(
        "size",
        description='Shard files at start: `"size"` compares sizes, `"full"` reads and hashes '
        "them. Row groups are checked whenever they are read.",
    )
    on_corrupt: Literal["stop", "quarantine"] = Field(
        "stop",
        description='`"quarantine"`: train on the rows of another row group in place of one that '
        "is damaged or missing, and keep a record.",
    )
    cache_dir: Text | None = Field(
        None, description="Local folder for what was read from URLs, shared by this machine's runs."
    )
    cache_bytes: int = Field(
        64 << 30, ge=1, description="Largest size of that folder; the oldest row groups go first."
    )
    read_attempts: int = Field(
        8, ge=1, description="Attempts to read from a URL, with growing pauses in between."
    )
    read_timeout: float = Field(60.0, gt=0, description="Longest wait for one of them, in seconds.")


class ProfileConfig(Config):
    """`[profile]`: written into `profile/` of the run directory, a file for each process."""

    timeline: bool = Field(
        False, description="When each pipeline instruction of each step began and ended."
    )
    trace_step: int | None = Field(
        None, ge=1, description="Trace this step of the process with torch's profiler."
    )


class TrainConfig(Config):
    """Top-level keys."""

    model: Text = Field(
        description="Hugging Face model directory (config.json, *.safetensors, tokenizer.json), "
        "or the id of a model on the hub."
    )
    output_dir: Text = Field(
        description="Run directory: checkpoints, adapter, metrics, TensorBoard."
    )
    seed: int = Field(
        0, ge=0, description="Root of every random choice: row order, initial adapter, dropout."
    )
    epochs: int | None = Field(
        None, ge=1, description="Passes over the data. Default 1, unless `max_steps` is given."
    )
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps, instead of `epochs`.")
    micro_batch_size: int = Field(
        1, ge=1, description="Rows that pass through the pipeline together."
    )
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="Micro-batches per replica and step; more of them fill the pipeline better.",
    )
    pipeline_stages: int = Field(
        1, ge=1, description="Parts the model is cut into; must divide the number of processes."
    )
    partition: Literal["cost", "memory", "uniform"] | list[int] = Field(
        "cost",
        description='How layers are given to stages. `"cost"`: the slowest stage is as fast as can '
        'be. `"memory"`: the fullest is as small as can be. `"uniform"`: as many layers each. Or a '
        "list of the numbers of layers.",
    )
    weights: Literal["stored", "random"] = Field(
        "stored",
        description='`"random"`: made up from config.json and `seed`, for benchmarks and dry runs.',
    )
    router_loss: float | None = Field(
        None,
        ge=0,
        description="Weight of the loss that balances a mixture's experts, beside the loss of the "
        "tokens; 0 leaves it out. Default: the model's own `router_aux_loss_coef`.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description='Type of frozen weights and of the computation. `"auto"`: bfloat16 on GPUs, '
        "float32 on CPU. Trained weights are held in float32, unless `optimizer.type` differs.",
    )
    activation_checkpointing: Literal["none", "full"] = Field(
        "none",
        description='`"full"`: keep only the input of each layer and compute the rest again.',
    )
    kernels: Literal["auto", "torch"] = Field(
        "auto",
        description='`"auto"`: on GPUs, our Triton kernels and attention without masks. `"torch"`: '
        "their plain twins, transformers' and PEFT's own modules.",
    )
    compile: bool = Field(
        True, description='On GPUs with `kernels = "auto"`: compile decoder layers when first used.'
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads per process. Default: the machine's cores over its processes.",
    )
    mixing: Literal["concatenate", "interleave"] = Field(
        "concatenate",
        description='`"concatenate"`: rows of all datasets shuffled together. `"interleave"`: '
        "evenly spread by weight, to within one row at any moment.",
    )
    mixing_unit: Literal["tokens", "rows"] = Field(
        "tokens", description="What the weights count; tokens by each dataset's mean row."
    )
    mixing_stop: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted",
        description="An epoch ends when one dataset has given its rows, or when all have, the "
        "others going on from their start.",
    )
    datasets: list[DatasetConfig] = Field(
        min_length=1,
        description="Train splits; `mixing` says how several become one.",
    )
    evaluation_datasets: list[EvaluationDatasetConfig] = Field([], description="Evaluation splits.")
    adapter: AdapterConfig = Field(AdapterConfig(), description="What is trained.")
    optimizer: OptimizerConfig = Field(description="How it is trained.")
    scheduler: SchedulerConfig = Field(
        SchedulerConfig(), description="The learning rate over time."
    )
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="When to evaluate.")
    checkpoint: CheckpointConfig = Field(
        CheckpointConfig(),
        description="When to save, besides the end of the run and SIGTERM, where it always does.",
    )
    anomalies: AnomalyConfig = Field(
        AnomalyConfig(), description="What to do with steps that go wrong."
    )
    loader: LoaderConfig = Field(LoaderConfig(), description="How shards are read.")
    profile: ProfileConfig = Field(ProfileConfig(), description="Where a step's time goes.")

    @model_validator(mode="after")
    def check(self) -> "TrainConfig":
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"epochs = {self.epochs} and max_steps = {self.max_steps} exclude each other; "
                "keep one"
            )
        if self.scheduler.min_lr > self.optimizer.lr:
            raise ValueError(
                f"scheduler.min_lr = {self.scheduler.min_lr} is above "
                f"optimizer.lr = {self.optimizer.lr}; lower it"
            )
        self.check_mixing()
        self.check_packing()
        for key, wished in (
            ("evaluation.patience", self.evaluation.patience),
            ("checkpoint.keep_best", self.checkpoint.keep_best),
        ):
            if wished and not self.evaluation_datasets:
                raise ValueError(
                    f"{key} needs an evaluation loss; add [[evaluation_datasets]] or remove it"
                )
        names = self.evaluation_names()
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f'two evaluation datasets are named "{name}"; give each its own `name`'
                )
        return self

    def check_mixing(self) -> None:
        """Concatenation takes every row, so nothing may ask it for other shares."""
        if self.mixing == "interleave":
            return
        weights = [dataset.weight for dataset in self.datasets]
        if len(set(weights)) > 1:
            raise ValueError(
                f"the weights of the datasets differ ({', '.join(map(str, weights))}), but "
                'mixing = "concatenate" takes all rows; set mixing = "interleave" or drop them'
            )
        for key in ("mixing_unit", "mixing_stop"):
            if key in self.model_fields_set:
                raise ValueError(
                    f'{key} = "{getattr(self, key)}" has no meaning with mixing = "concatenate"; '
                    'set mixing = "interleave" or drop it'
                )

    def check_packing(self) -> None:
        """What is said about packing needs packing."""
        if self.loader.pack == "none":
            for key in ("tokens_per_row", "look_ahead", "overlong"):
                if key in self.loader.model_fields_set:
                    raise ValueError(
                        f"loader.{key} = {getattr(self.loader, key)!r} has no meaning with "
                        'loader.pack = "none"; set loader.pack = "best_fit" or drop it'
                    )
        elif self.loader.on_corrupt == "quarantine" and self.max_steps is None:
            raise ValueError(
                'with loader.pack = "best_fit" and loader.on_corrupt = "quarantine" the number of '
                "steps cannot be known ahead; set max_steps in place of epochs"
            )

    def evaluation_names(self) -> list[str]:
        """The name of each evaluation dataset, as it appears in logs."""
        return [
            dataset.name or dataset.path.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]
            for dataset in self.evaluation_datasets
        ]
