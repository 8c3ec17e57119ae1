"""The tables `[adapter]` and `[vision]`: the weights that `headrace train` trains."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from headrace.schemas.config_model import Config, Text
from headrace.schemas.train.layer_ranges import parse_layers
from headrace.schemas.train.starting_adapter import with_start
from headrace.schemas.train.tuning_methods import DESCRIPTION, TUNING_METHODS, TuningRecord

if TYPE_CHECKING:
    TuningKind = str
else:
    TuningKind = Literal[tuple(TUNING_METHODS)]

GAMMA = 0.5
# keys for products alone
MOST_RANK = 1 << 17  # no weight has more
OF_PRODUCTS = ("exclude_modules", "rank_pattern", "alpha_pattern", "trainable_token_indices")


class AdapterConfig(Config):
    """`[adapter]`."""

    kind: TuningKind = Field("lora", description=DESCRIPTION)
    path: Text | None = Field(
        None,
        description="Directory of an adapter that PEFT has written (so do Axolotl, Unsloth and "
        "LLaMA-Factory), which training starts from. Its `adapter_config.json` decides `kind`, "
        "`rank`, `alpha`, `rslora`, targets, patterns, `layers` and `modules_to_save`, which need "
        "not be given, and must not differ.",
    )
    rank: int = Field(16, ge=1, le=MOST_RANK, description="Rank of the LoRA matrices.")
    alpha: float | None = Field(
        None, gt=0, description="LoRA scale is alpha / rank. Default: the rank, scale 1."
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")
    init: Literal["kaiming", "gaussian", "pissa", "olora", "loftq"] = Field(
        "kaiming",
        description="What adapters start from. The first two start at no change; "
        '`"pissa"` and `"olora"` take the principal part of each weight over, by singular values '
        'or by QR; `"loftq"` takes that of what a weight loses when it is quantized.',
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    target_modules: Text | list[Text] = Field(
        "all-linear",
        description='`"all-linear"` (shared experts and dense layers of mixtures included, the '
        'head and routers left out); names such as `["q_proj", "v_proj"]`; or a regular expression '
        'that a module\'s whole name must match, as `".*layers\\.[0-9]\\.mlp\\..*_proj"`. '
        '`"embed_tokens"` and `"lm_head"` can have adapters as well. With `kind = "none"`: train '
        "only weights with one of the names listed in their own.",
    )
    exclude_modules: Text | list[Text] = Field(
        [],
        description="Targets that get no adapter: names, or a regular expression for whole names.",
    )
    rank_pattern: dict[Text, Annotated[int, Field(ge=1, le=MOST_RANK)]] = Field(
        {},
        description="Ranks that differ, by name of the module or a regular expression for the end "
        'of its name, such as `{"layers.0.mlp.down_proj" = 32}`; the first that matches counts.',
    )
    alpha_pattern: dict[Text, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Values of `alpha` that differ, likewise."
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
    vision: bool = Field(
        False,
        description="Targets in the vision tower and the projector get adapters too. Needs "
        "`[vision]`.",
    )
    modules_to_save: list[Text] = Field(
        [], description='Modules trained in full beside the adapters, such as `["lm_head"]`.'
    )
    trainable_token_indices: list[Annotated[int, Field(ge=0)]] = Field(
        [],
        description="Ids of tokens whose rows of embedding and head are trained beside adapters, "
        "as in PEFT. Default: those of `model_overrides.new_tokens`, unless `modules_to_save` has "
        "the embedding.",
    )
    gamma: float = Field(
        GAMMA,
        gt=0,
        le=0.5,
        description='With `kind = "control"`: directions after each step: '
        "Q - gamma Q (Q^T Q - I); 0.5 makes them orthonormal, in three such steps.",
    )
    control_decay: float = Field(
        0.0,
        ge=0,
        description='With `kind = "control"`: share, times the learning rate, by which log '
        "stretches shrink after each step.",
    )
    blocks: int = Field(8, ge=1, description='New decoder layers, with `kind = "blocks"`.')

    @property
    def record(self) -> TuningRecord:
        """Return what the rules of a config ask of the kind."""
        return TUNING_METHODS[self.kind]

    def training_too(self, part: str) -> "AdapterConfig":
        """Return the same with one more part of the model that is trained whole."""
        if self.record.has_products:
            return self.model_copy(update={"modules_to_save": [*self.modules_to_save, part]})
        if isinstance(self.target_modules, str):
            return self
        return self.model_copy(update={"target_modules": [*self.target_modules, part]})

    @property
    def target_pattern(self) -> str | None:
        """Return the regular expression that names the targets, if one does."""
        pattern = self.target_modules
        return pattern if isinstance(pattern, str) and pattern != "all-linear" else None

    @property
    def takes_over(self) -> bool:
        """Return whether adapters start from a part of the frozen weights, taken out of these."""
        return self.record.takes_over and self.init in ("pissa", "olora", "loftq")

    @model_validator(mode="before")
    @classmethod
    def read_start(cls, values: Any) -> Any:
        """Take the settings of the adapter that training starts from."""
        if isinstance(values, dict) and isinstance(values.get("path"), str) and values["path"]:
            return with_start(values, parse_layers)
        return values

    @field_validator("layers")
    @classmethod
    def check_layers(cls, value: str | None) -> str | None:
        if value is not None:
            parse_layers(value)
        return value

    @model_validator(mode="after")
    def check(self) -> "AdapterConfig":
        taken = self.init in ("pissa", "olora", "loftq")
        products = self.record.has_products
        if taken and products and not self.record.takes_over:
            raise ValueError(
                f'init = "{self.init}" does not go with kind = "{self.kind}"; choose one'
            )
        if self.target_parameters and products and not self.record.adapts_parameters:
            raise ValueError(
                f'target_parameters do not go with kind = "{self.kind}"; use kind = "lora"'
            )
        if self.target_parameters and self.dropout:
            raise ValueError(
                f"dropout = {self.dropout} does not go with target_parameters; set it to 0"
            )
        if self.target_parameters and taken:
            raise ValueError(f'init = "{self.init}" does not go with target_parameters')
        if self.target_pattern is not None and not products:
            raise ValueError(
                f'target_modules = "{self.target_pattern}": with kind = "{self.kind}" give a list '
                "of names"
            )
        if self.target_pattern is not None and self.layers is not None:
            raise ValueError(
                f'layers = "{self.layers}" does not go with a regular expression in '
                "target_modules; name the layers in the expression"
            )
        if self.record.by_class:
            if self.target_modules != "all-linear":
                raise ValueError(
                    f'target_modules = {self.target_modules} has no meaning with kind = "control", '
                    "which has an adapter a layer; use layers, or drop it"
                )
        elif self.gamma != GAMMA or self.control_decay:
            raise ValueError(
                'gamma and control_decay need kind = "control"; this has kind = '
                f'"{self.kind}"; drop them'
            )
        for key in (*self.record.unused, *(() if products else OF_PRODUCTS)):
            if getattr(self, key):
                raise ValueError(f'{key} has no meaning with kind = "{self.kind}"; drop it')
        return self


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
