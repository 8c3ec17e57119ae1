"""The `[model_overrides]` table: settings of the model that differ from its config.json."""

from typing import Literal

from pydantic import Field, model_validator

from headrace.schemas.config_model import Config, Text

RopeType = Literal["linear", "dynamic", "yarn", "longrope", "llama3"]
# type of scaling -> settings it needs, and others that it may have
NEEDED = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor"},
    "longrope": {"short_factor", "long_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}
ORIGINAL = "original_max_position_embeddings"
ALLOWED = {
    "linear": set(),
    "dynamic": set(),
    "yarn": {
        ORIGINAL,
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "longrope": {ORIGINAL, "attention_factor", "factor"},
    "llama3": {ORIGINAL},
}


class RopeScaling(Config):
    """`[model_overrides.rope_scaling]`, as transformers names it in `rope_parameters`."""

    rope_type: RopeType = Field(description="How rotary positions are scaled.")
    factor: float | None = Field(None, ge=1, description="By how much the text may be longer.")
    original_max_position_embeddings: int | None = Field(
        None, ge=1, description="Positions before scaling. Default: the model's own."
    )
    rope_theta: float | None = Field(
        None, gt=0, description="Base of the frequencies. Default: the model's own."
    )
    attention_factor: float | None = Field(None, gt=0, description="Of yarn and longrope.")
    beta_fast: float | None = Field(None, gt=0, description="Of yarn.")
    beta_slow: float | None = Field(None, gt=0, description="Of yarn.")
    mscale: float | None = Field(None, gt=0, description="Of yarn.")
    mscale_all_dim: float | None = Field(None, gt=0, description="Of yarn.")
    truncate: bool | None = Field(None, description="Of yarn.")
    short_factor: list[float] | None = Field(
        None, min_length=1, description="Of longrope: by frequency, for short texts."
    )
    long_factor: list[float] | None = Field(
        None, min_length=1, description="Of longrope: by frequency, for long texts."
    )
    low_freq_factor: float | None = Field(None, gt=0, description="Of llama3.")
    high_freq_factor: float | None = Field(None, gt=0, description="Of llama3.")

    @model_validator(mode="after")
    def check(self) -> "RopeScaling":
        given = self.settings.keys() - {"rope_type", "rope_theta"}
        missing = NEEDED[self.rope_type] - given
        unknown = given - NEEDED[self.rope_type] - ALLOWED[self.rope_type]
        if missing:
            raise ValueError(f'rope_type = "{self.rope_type}" needs {", ".join(sorted(missing))}')
        if unknown:
            raise ValueError(
                f'{", ".join(sorted(unknown))} has no meaning with rope_type = "{self.rope_type}"; '
                "drop it"
            )
        return self

    @property
    def settings(self) -> dict[str, object]:
        """Return what is set, by transformers' names."""
        return self.model_dump(exclude_none=True)


class ModelOverrides(Config):
    """`[model_overrides]`."""

    max_position_embeddings: int | None = Field(
        None,
        ge=1,
        description="Positions that the model is said to have. Default: what config.json says.",
    )
    rope_scaling: RopeScaling | None = Field(
        None,
        description="Scaling of rotary positions, in place of the model's own. Default: that.",
    )
    new_tokens: list[Text] = Field(
        [],
        description="Tokens that the model's tokenizer does not have yet, in the order of "
        "`added_tokens` of `headrace prepare`. Embedding and head grow by them, each starting as "
        "the mean of the rows there are.",
    )

    @model_validator(mode="after")
    def check(self) -> "ModelOverrides":
        for token in self.new_tokens:
            if self.new_tokens.count(token) > 1:
                raise ValueError(f'new_tokens: "{token}" is there twice; drop one')
        return self
