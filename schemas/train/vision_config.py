"""The `[vision]` table: training with the pictures of a vision-language model."""

from pydantic import Field

from headrace.schemas.config_model import Config


class VisionConfig(Config):
    """`[vision]`."""

    train: bool = Field(
        False,
        description='With `adapter.kind = "none"`: train the vision tower too. Under adapters: '
        "`adapter.vision`.",
    )
    projector: bool = Field(
        False,
        description="Train the projector between tower and language model, in full; under LoRA it "
        "becomes one of `adapter.modules_to_save`.",
    )
