"""The `[objective]` table: the loss that a step minimizes."""

from typing import Literal

from pydantic import Field, model_validator

from headrace.schemas.toml_config import Config

# kinds that adjust the loss of each token, and those that compare the two sides of a pair
WITH_GAMMA = ("focal", "focal_star", "inverse_focal", "exponentiated")
OF_PAIRS = ("dpo", "orpo")
# kind -> settings that mean something beside it
SETTINGS = {
    **dict.fromkeys(WITH_GAMMA, ("gamma",)),
    "dpo": ("loss", "beta", "label_smoothing", "sft_weight"),
    "orpo": ("beta", "sft_weight"),
}


class ObjectiveConfig(Config):
    """`[objective]`."""

    kind: Literal[
        "cross_entropy", "focal", "focal_star", "inverse_focal", "exponentiated", "dpo", "orpo"
    ] = Field(
        "cross_entropy",
        description='Loss of each token, with p its probability: `"cross_entropy"`: -log p. '
        '`"focal"`: -(1 - p)^gamma log p. `"focal_star"`: cross-entropy of gamma times the logits, '
        'over gamma. `"inverse_focal"`: -(1 + p)^gamma log p. `"exponentiated"`: '
        '(-log p)^gamma / gamma. Or of each pair of a preference set: `"dpo"`, `"orpo"`.',
    )
    gamma: float | None = Field(
        None, gt=0, description="Exponent or factor of the four adjusted losses; they need one."
    )
    loss: Literal["sigmoid", "hinge", "ipo", "apo_zero"] = Field(
        "sigmoid",
        description="DPO's loss of the margin m between the rewards of both answers. "
        '`"sigmoid"`: -log sigmoid(m). `"hinge"`: max(0, 1 - m). `"ipo"`: rewards by token, '
        '(m / beta - 1 / (2 beta))^2. `"apo_zero"`: 1 - sigmoid(chosen) + sigmoid(rejected), '
        "KTO's without its baseline.",
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="DPO: reward = beta * (log p - log p of the reference). ORPO: weight of the "
        "odds ratio.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description='Share of pairs that are taken to be the wrong way round; `"sigmoid"` only.',
    )
    sft_weight: float | None = Field(
        None,
        ge=0,
        description="Weight of the chosen answer's cross-entropy by token beside it (RPO's alpha). "
        "Default: 0 for DPO, 1 for ORPO.",
    )

    @property
    def of_pairs(self) -> bool:
        """Return whether it compares the two sides of a pair."""
        return self.kind in OF_PAIRS

    @property
    def has_reference(self) -> bool:
        """Return whether it compares with the model as it was before training."""
        return self.kind == "dpo"

    @property
    def chosen_weight(self) -> float:
        """Weight of the chosen answer's cross-entropy beside the loss of a pair."""
        if self.sft_weight is not None:
            return self.sft_weight
        return 1.0 if self.kind == "orpo" else 0.0

    @model_validator(mode="after")
    def check(self) -> "ObjectiveConfig":
        if self.kind in WITH_GAMMA and self.gamma is None:
            raise ValueError(f'kind = "{self.kind}" needs a gamma, for example gamma = 2.0')
        for key in sorted(self.model_fields_set - {"kind", *SETTINGS.get(self.kind, ())}):
            raise ValueError(f'{key} has no meaning with kind = "{self.kind}"; drop it')
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f'label_smoothing = {self.label_smoothing} has no meaning with loss = "{self.loss}"'
                '; drop it, or set loss = "sigmoid"'
            )
        return self
