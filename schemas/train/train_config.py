"""The config of `headrace train`."""

from pydantic import Field, model_validator

from headrace.schemas.config_model import Text
from headrace.schemas.train.data_config import DataConfig
from headrace.schemas.train.model_config import ModelConfig
from headrace.schemas.train.run_config import (
    AnomalyConfig,
    CheckpointConfig,
    EvaluationConfig,
    ProfileConfig,
    ReportingConfig,
)
from headrace.schemas.train.train_rules import check_rules


class TrainConfig(ModelConfig, DataConfig):
    """Top-level keys of the model, of the data, and of the run itself."""

    output_dir: Text = Field(
        description="Run directory: checkpoints, adapter, metrics, TensorBoard."
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads per process. Default: the machine's cores over its processes.",
    )
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="When to evaluate.")
    checkpoint: CheckpointConfig = Field(
        CheckpointConfig(),
        description="When to save, besides the end of the run and SIGTERM, where it always does.",
    )
    anomalies: AnomalyConfig = Field(
        AnomalyConfig(), description="What to do with steps that go wrong."
    )
    reporting: ReportingConfig = Field(ReportingConfig(), description="Who else gets the curves.")
    profile: ProfileConfig = Field(ProfileConfig(), description="Where a step's time goes.")

    @model_validator(mode="after")
    def check(self) -> "TrainConfig":
        check_rules(self)
        return self
