"""Options of pictures: `[images]` of the config of `headrace prepare`."""

from typing import Any, Literal

from pydantic import Field, JsonValue

from headrace.schemas.addresses import Address
from headrace.schemas.config_model import Config, Text

MOST_PIXELS = 89_478_485  # from which on Pillow warns of a bomb


class ImagesConfig(Config):
    """Keys of pictures: their folder, their limits, and the form in which they are kept."""

    model: Text = Field(
        description="Directory of the vision-language model: its processor's files decide how "
        "pictures are resized and how many tokens they fill."
    )
    folder: Address | None = Field(
        None,
        description="Folder that rows' paths of pictures are relative to, also a remote one. "
        "Without it only pictures in rows themselves, or at `addresses`, are read.",
    )
    addresses: list[Address] = Field(
        [],
        description="Beginnings of URLs that rows may name pictures at, as "
        '`["https://example.com/pictures", "s3://bucket"]`. Options behind a `?` are not part of '
        "what rows name.",
    )
    processor: dict[Text, JsonValue] = Field(
        {},
        description="Settings of the processor that decide sizes, in place of the model's own, as "
        "`{max_pixels = 602112}` or `{do_pan_and_scan = true}`.",
    )
    max_count: int = Field(
        64, ge=1, le=4096, description="Refuse documents with more pictures than this."
    )
    max_pixels: int = Field(
        MOST_PIXELS,
        ge=1,
        le=MOST_PIXELS,
        description="Refuse documents with a picture of more pixels, before it is unpacked.",
    )
    max_bytes: int = Field(
        32 << 20,
        ge=1,
        le=1 << 30,
        description="Refuse documents with a picture whose file is larger.",
    )
    max_ratio: float = Field(
        200.0,
        ge=1,
        le=10_000,
        description="Refuse documents with a picture of which one side is so many times the other.",
    )
    encoding: Literal["png", "webp", "jpeg"] = Field(
        "png",
        description='How prepared pictures are kept: `"png"` and `"webp"` without loss, `"jpeg"` '
        "with some, in about a third of the bytes.",
    )
    jpeg_quality: int = Field(95, ge=50, le=100, description="Quality of `jpeg`.")
    block_pictures: int = Field(
        128,
        ge=1,
        le=1 << 16,
        description="About so many pictures end a block, as `block_bytes` of text do: a worker "
        "holds those of one block in memory.",
    )
    row_group_bytes: int = Field(
        64 << 20,
        ge=1 << 12,
        le=1 << 30,
        description="Bytes of pictures that end a Parquet row group, as `row_group_tokens` do.",
    )
    identity: dict[str, Any] | None = Field(
        None,
        description="What the model's files say and which Pillow prepares, as `prepare.json` has "
        "them; written by the run.",
    )
