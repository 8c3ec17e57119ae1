"""The `[filters]`, `[deduplicate]` and `[decontaminate]` tables of `headrace prepare`."""

from typing import Annotated

from pydantic import Field, model_validator

from headrace.schemas.addresses import Address
from headrace.schemas.config_model import Config, Text


class FiltersConfig(Config):
    """The `[filters]` table: documents to leave out. Nothing is left out by default."""

    min_characters: int | None = Field(None, ge=1, description="Fewest characters.")
    max_characters: int | None = Field(None, ge=1, description="Most characters.")
    min_tokens: int | None = Field(None, ge=1, description="Fewest tokens, BOS and EOS included.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens.")
    min_alphabetic_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Smallest share of letters, of any script, in the characters that are not "
        "white space. English prose has 0.9 to 0.97, Python code 0.7 to 0.9.",
    )
    max_repeated_line_share: float | None = Field(
        None, ge=0, le=1, description="Largest share of characters in lines that came before."
    )
    max_compressible_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Largest share of bytes that zlib's level 1 saves. English prose has 0.4 to "
        "0.65, Python code 0.55 to 0.75, text that repeats itself more than 0.9.",
    )

    @model_validator(mode="after")
    def check_order(self) -> "FiltersConfig":
        for unit in ("characters", "tokens"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and high is not None and low > high:
                raise ValueError(
                    f"min_{unit} = {low} is more than max_{unit} = {high}; no document fits"
                )
        return self


class DeduplicateConfig(Config):
    """The `[deduplicate]` table. Of equal or similar documents the first in input order stays."""

    exact: bool = Field(
        False,
        description="Drop documents that equal an earlier one but for case, white space and "
        "Unicode form.",
    )
    near: bool = Field(
        False,
        description="Drop documents that are similar to an earlier one (MinHash-LSH over windows "
        "of 24 characters; needs the extra `dedup`).",
    )
    similarity: float = Field(
        0.8,
        ge=0.5,
        le=0.99,
        description="Jaccard similarity at which half of the near duplicates are found.",
    )
    permutations: int = Field(
        128, ge=16, le=1024, description="Hashes in a document's MinHash; more are sharper."
    )

    @property
    def enabled(self) -> bool:
        """Return whether duplicates are searched for."""
        return self.exact or self.near


class DecontaminateConfig(Config):
    """The `[decontaminate]` table: documents that share text with evaluation sets are left out."""

    paths: Annotated[list[Address], Field(min_length=1)] = Field(
        description="Files of evaluation sets, or globs: `.txt` and `.md` as texts, all others as "
        "records."
    )
    fields: list[Text] = Field(
        [], description="Fields of the records whose texts count. Default: all, at any depth."
    )
    words: int = Field(
        13,
        ge=5,
        le=100,
        description="Words of a run that no document may share with a set, whatever their case "
        "and punctuation; a Chinese or Japanese character is a word. Shorter texts of a set are "
        "not looked for.",
    )
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="What `prepare.json` says of the sets' runs; the run stops where they differ.",
    )
