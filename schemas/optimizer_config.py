"""How `headrace train` trains it: `[optimizer]` and `[scheduler]`."""

from typing import Literal

from pydantic import Field, model_validator

from headrace.schemas.toml_config import Config


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
