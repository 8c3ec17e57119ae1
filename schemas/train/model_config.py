"""Top-level keys of the model, of how it is cut, held and computed."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from headrace.schemas.config_model import Text
from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.schemas.train.data_config import BatchConfig
from headrace.schemas.train.model_overrides import ModelOverrides
from headrace.schemas.train.objective_config import ObjectiveConfig
from headrace.schemas.train.optimizer_config import (
    OptimizerConfig,
    RegularizationConfig,
    ReloraConfig,
    SchedulerConfig,
)
from headrace.schemas.train.parallel_dims import ParallelDims
from headrace.schemas.train.quantization_config import QuantizationConfig

SHARD = "weight_shard"
HalfLayers = Annotated[int | float, Field(gt=0, multiple_of=0.5)]


class LayoutConfig(BatchConfig):
    """Top-level keys of how a model and its rows are cut over processes."""

    pipeline_stages: int = Field(
        1, ge=1, description="Parts the model is cut into; must divide the number of processes."
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="Processes of each stage among which every row is cut: each holds its share of "
        "the tokens, and in attention, which sees whole rows, its share of the heads (Ulysses). "
        "Must divide the model's attention heads and the tokens of a row.",
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="Processes of each stage among which weights are cut, by transformers' plan "
        "for the model: linear layers by outputs or inputs, experts, embedding and head by tokens. "
        "Must divide the attention's key heads, the MLP's width, experts and vocabulary.",
    )
    sequence_slices: int = Field(
        1,
        ge=1,
        description="Slices into which every row of a micro-batch is cut: they go through the "
        "stages one after the other, which wait less for the first and the last micro-batches and "
        "hold fewer activations. Attention sees the kept keys and values of earlier slices, so "
        "results are the same. Must divide the tokens of a row.",
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
    neighbors: Literal["stages", "replicas"] = Field(
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
    vision_stages: int = Field(
        0,
        ge=0,
        le=1,
        description="Stages of the vision tower's own: with 1 the first holds the tower, the "
        "projector and the embedding, and no decoder layer. Needs `[vision]`.",
    )

    @model_validator(mode="before")
    @classmethod
    def read_earlier_spelling(cls, values: Any) -> Any:
        """Accept `neighbours`, which configs of earlier runs have."""
        if isinstance(values, dict) and "neighbours" in values and "neighbors" not in values:
            values = {**values, "neighbors": values["neighbours"]}
            del values["neighbours"]
        return values

    @property
    def replica_ranks(self) -> int:
        """Return the number of processes that hold one replica of the model."""
        return self.pipeline_stages * self.sequence_parallel * self.tensor_parallel

    def dims(self, processes: int) -> ParallelDims:
        """Return how a run of so many processes lies along the parallel dimensions.

        Raises:
            ConfigError: they do not fit.
        """
        return ParallelDims.of(
            processes,
            stages=self.pipeline_stages,
            sequence=self.sequence_parallel,
            tensor=self.tensor_parallel,
            neighbors=self.neighbors,
        )

    @property
    def parts(self) -> int:
        """Return the number of parts of the model: one for each stage, or each chunk of a stage."""
        chunks = self.stage_chunks if self.schedule == "interleaved" else 1
        return self.pipeline_stages * chunks


class ModelConfig(LayoutConfig):
    """Top-level keys of a model: which it is, what of it is trained, how it is held and run."""

    model: Text = Field(
        description="Hugging Face model directory (config.json, *.safetensors, tokenizer.json), "
        "or the id of a model on the hub."
    )
    model_overrides: ModelOverrides = Field(
        ModelOverrides(), description="Settings of the model that differ from its config.json."
    )
    weights: Literal["stored", "pickled", "random"] = Field(
        "stored",
        description='`"pickled"`: `pytorch_model.bin` may be read, by the unpickler of torch for '
        'tensors alone (`weights_only=True`). `"random"`: made up from config.json and `seed`, for '
        "benchmarks and dry runs.",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run the code that lies in the model's directory (`auto_map` in its "
        "config.json), with all that you may do on this machine. Read it before.",
    )
    router_loss: float | None = Field(
        None,
        ge=0,
        description="Weight of the loss that balances a mixture's experts, beside the loss of the "
        "tokens; 0 leaves it out. Default: the model's own `router_aux_loss_coef`.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description='Type of frozen weights and of the computation. `"auto"`: bfloat16 on GPUs, '
        'float32 on CPU. `"float16"`: for GPUs without bfloat16 (V100, T4); adapters alone are '
        "trained, and the loss is scaled. Trained weights are held in float32, unless "
        "`optimizer.type` differs.",
    )
    trained_matmul: Literal["auto", "fp8"] = Field(
        "auto",
        description='`"fp8"`: multiply trained weights of the decoder layers\' linear layers in '
        "8-bit floats, in the forward pass and for the gradient of the input; their own gradients "
        "are products in `dtype`. For full fine-tuning; frozen weights: `[quantization]`.",
    )
    activation_checkpointing: (
        Literal["none", "selective", "attention", "full"] | Annotated[int, Field(ge=1)] | Text
    ) = Field(
        "none",
        description='`"full"`: keep only the input of each layer and compute the rest again. '
        '`"selective"`: keep attention and most matrix products as well. `"attention"`: keep '
        "attention's results too, for long rows; layers are not compiled then. "
        'A number n: of every n-th layer. Or a list of layers such as `"0:15,20"`; ends count.',
    )
    activation_offload: bool = Field(
        False,
        description="Hold these inputs, and kept results of attention, in host memory until the "
        "backward pass asks for them.",
    )
    tiles: int = Field(
        1,
        ge=1,
        description="Parts of a row's tokens over which each MLP goes one after the other, run "
        "once more in the backward pass: for long rows, of which a layer's MLP takes most memory. "
        "Layers are not compiled then.",
    )
    weight_offload: Literal["none", "mlp", "experts"] = Field(
        "none",
        description="Frozen weights that are held in host memory, all but two layers' at a time: "
        "of the MLPs, experts included, or of a mixture's experts alone.",
    )
    weight_shard: Literal["none", "mlp", "experts", "layers"] = Field(
        "none",
        description="Frozen weights that are shared out among all processes that would hold the "
        "same ones, replicas and those that share rows, and gathered a layer ahead, all but two "
        "layers' at a time: of whole decoder layers, of the MLPs, or of a mixture's experts.",
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

    @property
    def moved_weights(self) -> tuple[str, Literal["none", "mlp", "experts", "layers"]]:
        """Return the key by which frozen weights come to the device layer by layer, and which."""
        if self.weight_shard != "none":
            return SHARD, self.weight_shard
        return "weight_offload", self.weight_offload

    def of_teacher(self) -> "ModelConfig":
        """Return the config by which an objective's teacher is laid out: a model alone, frozen."""
        changes = {
            "model": self.objective.teacher,
            "model_overrides": ModelOverrides(),
            "weights": "stored",
            "adapter": AdapterConfig(kind="none"),
            "objective": ObjectiveConfig(),
            "regularization": RegularizationConfig(),
            "partition": self.partition if isinstance(self.partition, str) else "cost",
            "half_layers": False,
            "activation_checkpointing": "none",
            "activation_offload": False,
            "weight_offload": "none",
            "weight_shard": "none",
            "embedding_on_cpu": False,
            "trained_matmul": "auto",
            "router_loss": 0.0,
        }
        return self.model_copy(update=changes)
