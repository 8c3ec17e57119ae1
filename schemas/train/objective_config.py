"""The `[objective]` table: the loss that a step minimizes; and `[rejected_sampling]`."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from headrace.schemas.config_model import Config, Text
from headrace.schemas.train.objectives import OBJECTIVES, ObjectiveRecord, described

if TYPE_CHECKING:
    ObjectiveKind = str
else:
    ObjectiveKind = Literal[tuple(OBJECTIVES)]

DRAWN_ONLY = ("top_p", "min_p", "temperature_last")  # no meaning where the likeliest is taken


class ObjectiveConfig(Config):
    """`[objective]`."""

    kind: ObjectiveKind = Field(
        "cross_entropy",
        description=f"Loss of each token, with p its probability: {described('rows')} "
        f"Or of each pair of a preference set: {described('pairs')} "
        f"Or of each labeled answer: {described('unpaired')}",
    )
    gamma: float | None = Field(
        None,
        gt=0,
        description="Exponent or factor of the four adjusted losses, or the margin of SimPO's "
        "rewards; they need one.",
    )
    loss: Literal["sigmoid", "hinge", "ipo", "apo_zero"] = Field(
        "sigmoid",
        description="DPO's and CPO's loss of the margin m between the rewards of both answers. "
        '`"sigmoid"`: -log sigmoid(m). `"hinge"`: max(0, 1 - m). `"ipo"`: rewards by token, '
        '(m / beta - 1 / (2 beta))^2. `"apo_zero"`: 1 - sigmoid(chosen) + sigmoid(rejected), '
        "KTO's without its baseline; both are losses of KTO too.",
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="DPO and KTO: reward = beta * (log p - log p of the reference). CPO and SimPO: "
        "without one. ORPO: weight of the odds ratio.",
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
        "Default: 0 for DPO and SimPO, 1 for ORPO and CPO.",
    )

    desirable_weight: float = Field(1.0, ge=0, description="Weight of KTO's good answers.")
    undesirable_weight: float = Field(1.0, ge=0, description="Weight of its bad ones.")

    center: float = Field(
        0.0,
        ge=0,
        description="Reward models: weight of the mean square of both rewards' sum beside the "
        "loss, which holds them about 0.",
    )

    teacher: Text | None = Field(
        None,
        description="Directory of the model that is learned from, or its id on the hub. It has the "
        "same tokenizer, and goes through the same stages.",
    )
    teacher_weight: float = Field(
        1.0, gt=0, le=1, description="Weight of the divergence; the rest is the cross-entropy's."
    )
    divergence: float = Field(
        0.0,
        ge=0,
        le=1,
        description="0: KL(teacher || student). 1: KL(student || teacher). Between them the "
        "generalized Jensen-Shannon divergence.",
    )
    temperature: float = Field(
        1.0, gt=0, description="Divides the logits of both before the divergence is taken."
    )

    @property
    def record(self) -> ObjectiveRecord:
        """Return all that is known of the objective."""
        return OBJECTIVES[self.kind]

    @property
    def of_pairs(self) -> bool:
        """Return whether it compares the two sides of a pair."""
        return self.record.columns == "pairs"

    @property
    def has_baseline(self) -> bool:
        """Return whether it compares with answers to other prompts of the micro-batch."""
        return self.loss in self.record.baselines

    @property
    def sequences(self) -> int:
        """Return the number of sequences that a row takes: two for a pair, or with a baseline."""
        return 2 if self.of_pairs or self.has_baseline else 1

    @property
    def has_reference(self) -> bool:
        """Return whether it compares with the model as it was before training."""
        return self.record.has_reference

    @property
    def chosen_weight(self) -> float:
        """Weight of the chosen answer's cross-entropy beside the loss of a pair."""
        return self.record.sft_weight if self.sft_weight is None else self.sft_weight

    @model_validator(mode="after")
    def check(self) -> "ObjectiveConfig":
        if self.record.gamma is not None and self.gamma is None:
            raise ValueError(
                f'kind = "{self.kind}" needs a gamma, for example gamma = {self.record.gamma}'
            )
        if self.record.has_teacher and self.teacher is None:
            raise ValueError(f'kind = "{self.kind}" needs a teacher, a model directory')
        if self.record.losses and self.loss not in self.record.losses:
            known = ", ".join(f'"{name}"' for name in self.record.losses)
            raise ValueError(
                f'loss = "{self.loss}" does not go with kind = "{self.kind}"; choose one of {known}'
            )
        for key in sorted(self.model_fields_set - {"kind", *self.record.settings}):
            raise ValueError(f'{key} has no meaning with kind = "{self.kind}"; drop it')
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f'label_smoothing = {self.label_smoothing} has no meaning with loss = "{self.loss}"'
                '; drop it, or set loss = "sigmoid"'
            )
        return self


class RejectedSamplingConfig(Config):
    """`[rejected_sampling]`: the table alone turns it on."""

    max_new_tokens: int | None = Field(
        None, ge=1, description="Tokens of an answer at most. Default: what its place has room for."
    )
    max_answer_ratio: float | None = Field(
        None, gt=0, description="Likewise, in lengths of the chosen answer to the same prompt."
    )
    temperature: float = Field(
        1.0, ge=0, description="Divides the logits; 0 takes the likeliest token."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw from the likeliest tokens that have this share together."
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="Leave out tokens below this share of the likeliest one's."
    )
    temperature_last: bool = Field(
        False, description="Apply `top_p` and `min_p` before the temperature, not after it."
    )
    stop_tokens: list[int] | None = Field(
        None,
        min_length=1,
        description="Ids that end an answer. Default: the model's `eos_token_id` and the EOS of "
        "the shards' tokenizer.",
    )
    batch_size: int = Field(
        8,
        ge=1,
        description="Prompts of a replica that are answered together; as many such batches as "
        "there are stages are under way at a time.",
    )

    @model_validator(mode="after")
    def check(self) -> "RejectedSamplingConfig":
        for key in DRAWN_ONLY if self.temperature == 0 else ():
            if key in self.model_fields_set:
                raise ValueError(
                    f"{key} = {getattr(self, key)} has no meaning with temperature = 0, which "
                    "takes the likeliest token; drop one"
                )
        return self
