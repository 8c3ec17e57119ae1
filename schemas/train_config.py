"""The config of `headrace train`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from headrace.schemas.adapter_config import AdapterConfig
from headrace.schemas.data_config import DatasetConfig, EvaluationDatasetConfig, LoaderConfig
from headrace.schemas.layer_ranges import parse_layers
from headrace.schemas.objective_config import ObjectiveConfig
from headrace.schemas.optimizer_config import (
    OptimizerConfig,
    RegularizationConfig,
    ReloraConfig,
    SchedulerConfig,
)
from headrace.schemas.quantization_config import QuantizationConfig
from headrace.schemas.run_config import (
    AnomalyConfig,
    CheckpointConfig,
    EvaluationConfig,
    ProfileConfig,
    ReportingConfig,
)
from headrace.schemas.sampling_config import RejectedSamplingConfig
from headrace.schemas.toml_config import Config, Text

HalfLayers = Annotated[int | float, Field(gt=0, multiple_of=0.5)]


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
    schedule: Literal["1f1b", "interleaved"] = Field(
        "1f1b",
        description='`"interleaved"`: each stage holds several chunks of layers, and a micro-batch '
        "goes round the stages as often. They wait less for the first and the last micro-batches, "
        "hold more activations and send more. Needs `gradient_accumulation_steps` to be a multiple "
        "of `pipeline_stages`; results are the same.",
    )
    stage_chunks: int = Field(
        2, ge=2, description='Chunks of each stage with `schedule = "interleaved"`.'
    )
    neighbours: Literal["stages", "replicas"] = Field(
        "stages",
        description="Which ranks are next to each other, and so on one machine as far as possible: "
        'the stages of a replica, or the replicas of a stage (`"replicas"`).',
    )
    partition: Literal["cost", "memory", "uniform"] | list[HalfLayers] = Field(
        "cost",
        description='How layers are given to stages. `"cost"`: the slowest stage is as fast as can '
        'be. `"memory"`: the fullest is as small as can be. `"uniform"`: as many layers each. Or a '
        "list of the numbers of layers, such as [9.5, 9, 8, 5.5]. Interleaved, of chunks in the "
        "order of the model: those of stages 0, 1, ..., then these stages' second ones.",
    )
    half_layers: bool = Field(
        False,
        description="Let stages also begin between a layer's attention and its MLP; "
        "for families whose layers have one after the other, and without dropout.",
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
    activation_checkpointing: Literal["none", "full"] | Annotated[int, Field(ge=1)] | Text = Field(
        "none",
        description='`"full"`: keep only the input of each layer and compute the rest again. '
        'A number n: of every n-th layer. Or a list of layers such as `"0:15,20"`; ends count.',
    )
    activation_offload: bool = Field(
        False,
        description="Hold these inputs in host memory until the backward pass asks for them.",
    )
    weight_offload: Literal["none", "mlp", "experts"] = Field(
        "none",
        description="Frozen weights that are held in host memory, all but two layers' at a time: "
        "of the MLPs, experts included, or of a mixture's experts alone.",
    )
    embedding_on_cpu: bool = Field(
        False,
        description="Hold the frozen embedding in host memory and look rows up there.",
    )
    kernels: Literal["auto", "triton", "torch"] = Field(
        "auto",
        description='`"auto"`: on GPUs, our Triton kernels and attention without masks. '
        '`"triton"`: RMSNorm and rotary embedding by our kernels inside compiled layers as well, '
        "where the compiler's serve otherwise. `\"torch\"`: their plain twins, transformers' and "
        "PEFT's own modules.",
    )
    compile: bool = Field(
        True, description='On GPUs, unless `kernels = "torch"`: compile decoder layers.'
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
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="What is minimised.")
    rejected_sampling: RejectedSamplingConfig | None = Field(
        None,
        description="Rejected answers come from the model as it is before each step. "
        "Default: from the shards.",
    )
    adapter: AdapterConfig = Field(AdapterConfig(), description="What is trained.")
    quantization: QuantizationConfig | None = Field(
        None, description="How frozen weights are held. Default: as they are, in `dtype`."
    )
    optimizer: OptimizerConfig = Field(description="How it is trained.")
    scheduler: SchedulerConfig = Field(
        SchedulerConfig(), description="The learning rate over time."
    )
    regularization: RegularizationConfig = Field(
        RegularizationConfig(), description="What holds the trained weights back."
    )
    relora: ReloraConfig = Field(ReloraConfig(), description="Restarts of LoRA adapters.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="When to evaluate.")
    checkpoint: CheckpointConfig = Field(
        CheckpointConfig(),
        description="When to save, besides the end of the run and SIGTERM, where it always does.",
    )
    anomalies: AnomalyConfig = Field(
        AnomalyConfig(), description="What to do with steps that go wrong."
    )
    loader: LoaderConfig = Field(LoaderConfig(), description="How shards are read.")
    reporting: ReportingConfig = Field(ReportingConfig(), description="Who else gets the curves.")
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
        if self.optimizer.type == "adamw_schedule_free" and self.scheduler.type != "constant":
            raise ValueError(
                f'scheduler.type = "{self.scheduler.type}": optimizer.type = "adamw_schedule_free" '
                'takes the place of a falling rate; set "constant"'
            )
        if self.optimizer.type == "adamw_schedule_free" and self.checkpoint.weights_only:
            raise ValueError(
                "checkpoint.weights_only = true: the weights of optimizer.type = "
                '"adamw_schedule_free" are averages, which its states are needed for; drop one'
            )
        self.check_schedule()
        self.check_quantization()
        self.check_mixing()
        self.check_packing()
        self.check_checkpointing()
        self.check_offload()
        self.check_adapters_only()
        self.check_objective()
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

    def check_schedule(self) -> None:
        """Chunks must go round more than one stage, in rounds of whole micro-batches."""
        if self.schedule == "1f1b":
            if "stage_chunks" in self.model_fields_set:
                raise ValueError(
                    f'stage_chunks = {self.stage_chunks} has no meaning with schedule = "1f1b"; '
                    'set schedule = "interleaved" or drop it'
                )
            return
        stages, micro_batches = self.pipeline_stages, self.gradient_accumulation_steps
        if stages == 1:
            raise ValueError(
                'schedule = "interleaved" needs pipeline_stages = 2 or more; '
                "a single stage waits for nobody"
            )
        missing = -micro_batches % stages
        if missing:
            raise ValueError(
                f'schedule = "interleaved": gradient_accumulation_steps = {micro_batches} is not a '
                f"multiple of pipeline_stages = {stages}; use {micro_batches + missing}"
            )
        if isinstance(self.partition, list) and len(self.partition) != self.parts:
            raise ValueError(
                f"partition has {len(self.partition)} entries, but there are {self.parts} chunks, "
                f"{self.stage_chunks} of each of {stages} stages"
            )

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
        if self.relora.every_steps:
            raise ValueError(
                "relora.every_steps adds to the frozen weights, which [quantization] holds "
                "quantised; drop one"
            )
        if self.objective.has_reference and adapter.kind in ("none", "blocks"):
            raise ValueError(
                f'[quantization] goes with objective.kind = "{self.objective.kind}" only under '
                f'adapters, and adapter.kind = "{adapter.kind}"; use kind = "lora"'
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

    def check_checkpointing(self) -> None:
        """Only recomputed layers have inputs to offload."""
        setting = self.activation_checkpointing
        if isinstance(setting, str) and setting not in ("none", "full"):
            parse_layers(setting)
        if self.activation_offload and setting == "none":
            raise ValueError(
                "activation_offload moves the inputs of recomputed layers; "
                'set activation_checkpointing = "full" or drop it'
            )

    def check_offload(self) -> None:
        """What is in host memory must stay as it is."""
        kind = self.adapter.kind
        if self.weight_offload != "none" and kind in ("none", "blocks"):
            raise ValueError(
                f'weight_offload = "{self.weight_offload}" holds frozen weights under adapters, '
                f'and adapter.kind = "{kind}" trains and writes the weights themselves; use '
                'kind = "lora", or drop it and use more pipeline_stages'
            )
        if self.weight_offload != "none" and self.relora.every_steps:
            raise ValueError(
                f'weight_offload = "{self.weight_offload}" leaves weights as they are, and '
                "relora.every_steps adds to them; drop one"
            )
        if self.embedding_on_cpu and kind in ("none", "blocks"):
            raise ValueError(
                "embedding_on_cpu holds a frozen embedding under adapters, and adapter.kind = "
                f'"{kind}" writes the weights themselves; use kind = "lora" or drop it'
            )
        if self.embedding_on_cpu and self.quantization is not None and self.quantization.embedding:
            raise ValueError(
                "embedding_on_cpu and quantization.embedding are two ways to save the same memory; "
                "drop one"
            )

    def check_adapters_only(self) -> None:
        """What is done to the product BA needs one."""
        asked = {
            "regularization.product_decay": self.regularization.product_decay,
            "regularization.max_product_norm": self.regularization.max_product_norm,
            "relora.every_steps": self.relora.every_steps,
        }
        kinds = {"relora.every_steps": ("lora",)}
        for key, value in asked.items():
            if value and self.adapter.kind not in kinds.get(key, ("lora", "dora")):
                raise ValueError(
                    f'{key} = {value} has no meaning with adapter.kind = "{self.adapter.kind}"; '
                    "drop it"
                )
        if self.relora.every_steps and self.objective.has_reference:
            raise ValueError(
                f'relora.every_steps does not go with objective.kind = "{self.objective.kind}", '
                "which compares with the weights as they were"
            )
        for key in asked:
            if asked[key] and self.adapter.target_parameters:
                raise ValueError(f"{key} does not go with adapter.target_parameters; drop one")
        if self.relora.every_steps and self.adapter.init != "kaiming":
            raise ValueError(
                f'relora.every_steps needs adapter.init = "kaiming", not "{self.adapter.init}"'
            )
        if asked["regularization.product_decay"] and self.optimizer.type == "adamw_kahan":
            raise ValueError(
                'regularization.product_decay needs float32 adapters; set optimizer.type = "adamw"'
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

    def check_objective(self) -> None:
        """What is minimised must go with what is trained, and how it is fed."""
        kind, adapter = self.objective.kind, self.adapter
        if adapter.kind == "control" and self.optimizer.type == "adamw_kahan":
            raise ValueError(
                'adapter.kind = "control" is held in float32, which optimizer.type = '
                f'"{self.optimizer.type}" is not; choose another optimizer.type'
            )
        if not self.objective.of_pairs:
            if self.rejected_sampling is not None:
                raise ValueError(
                    f'[rejected_sampling] has no meaning with objective.kind = "{kind}", which has '
                    'no pairs; set kind = "dpo" or "orpo", or drop it'
                )
            return
        self.check_rejected_sampling()
        if adapter.kind == "control":
            raise ValueError(
                f'objective.kind = "{kind}" does not go with adapter.kind = "control", whose '
                "classes are for whole documents; use another adapter.kind"
            )
        if self.objective.has_reference and adapter.init in ("pissa", "olora"):
            raise ValueError(
                f'objective.kind = "{kind}" compares with the frozen weights, of which '
                f'adapter.init = "{adapter.init}" takes a part away; use another adapter.init'
            )
        if self.objective.has_reference and self.relora.every_steps:
            raise ValueError(
                f'objective.kind = "{kind}" compares with the frozen weights, into which '
                "relora.every_steps adds adapters; drop one of the two"
            )
        if self.loader.pack != "none" and self.loader.overlong != "error":
            raise ValueError(
                f'objective.kind = "{kind}" cannot cut or drop rows in packing; set '
                'loader.overlong = "error", and overlong = "truncate" or "drop" in preparing'
            )

    def check_rejected_sampling(self) -> None:
        """Answers go once through each stage."""
        if self.rejected_sampling is not None and self.schedule != "1f1b":
            raise ValueError(
                f'schedule = "{self.schedule}" does not go with [rejected_sampling], whose answers '
                'go once through each stage; set "1f1b"'
            )

    @property
    def parts(self) -> int:
        """Of the model: one for each stage, or chunk of a stage."""
        chunks = self.stage_chunks if self.schedule == "interleaved" else 1
        return self.pipeline_stages * chunks

    @property
    def places(self) -> int:
        """Of a micro-batch: one for each row, two for a pair."""
        return self.micro_batch_size * (2 if self.objective.of_pairs else 1)

    def evaluation_names(self) -> list[str]:
        """The name of each evaluation dataset, as it appears in logs."""
        return [
            dataset.name or dataset.path.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]
            for dataset in self.evaluation_datasets
        ]
