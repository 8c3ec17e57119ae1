"""The config of `headrace train`."""

from typing import Literal

from pydantic import Field, model_validator

from headrace.schemas.adapter_config import AdapterConfig
from headrace.schemas.data_config import DatasetConfig, EvaluationDatasetConfig, LoaderConfig
from headrace.schemas.optimizer_config import OptimizerConfig, SchedulerConfig
from headrace.schemas.quantization_config import QuantizationConfig
from headrace.schemas.run_config import (
    AnomalyConfig,
    CheckpointConfig,
    EvaluationConfig,
    ProfileConfig,
)
from headrace.schemas.toml_config import Config, Text


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
    quantization: QuantizationConfig | None = Field(
        None, description="How frozen weights are held. Default: as they are, in `dtype`."
    )
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
        self.check_quantization()
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

    def check_quantization(self) -> None:
        """There must be frozen weights; what adapters took from them is in no cache."""
        adapter = self.adapter
        if self.quantization is None:
            return
        if (adapter.kind, adapter.target_modules, adapter.layers) == ("none", "all-linear", None):
            raise ValueError(
                '[quantization] holds frozen weights, and adapter.kind = "none" trains them all; '
                'use kind = "lora", or limit target_modules or layers'
            )
        if self.quantization.cache is not None and adapter.init in ("pissa", "olora"):
            raise ValueError(
                f'quantization.cache does not go with adapter.init = "{adapter.init}", which '
                "changes the weights before they are quantised; drop one"
            )

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
