"""Rejected answers that the model itself gives: `[rejected_sampling]`."""

from pydantic import Field, model_validator

from headrace.schemas.config_model import Config

DRAWN_ONLY = ("top_p", "min_p", "temperature_last")  # no meaning where the likeliest is taken


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
