"""The columns of a shard, version 1, and how its Parquet is written."""

from typing import Final

import pyarrow as pa

from headrace.schemas.shards.shard_kind import ShardKind

SHARD_FORMAT: Final = "headrace-shards"
SHARD_FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
REJECTS_FOLDER = "rejects"
TRAIN: Final = "train"
EVALUATION: Final = "evaluation"
SPLITS = (TRAIN, EVALUATION)
FILE_STEMS = {TRAIN: "shard", EVALUATION: "evaluation"}


IMAGES = "images"
IMAGE_BYTES = "images.list.element.bytes"  # its path in Parquet
IMAGE_NUMBERS = ("picture", "tokens", "width", "height")
IMAGE_TYPE = pa.struct(
    [pa.field("bytes", pa.binary()), *(pa.field(name, pa.int32()) for name in IMAGE_NUMBERS)]
)
IMAGES_FIELD = pa.field(IMAGES, pa.list_(IMAGE_TYPE))

COLUMNS = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_())),
        pa.field("document_lengths", pa.list_(pa.int32()), nullable=False),
        pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("row_key", pa.uint64(), nullable=False),
        pa.field("control_class", pa.int8()),
    ]
)
SIDES = (("input_ids", "loss_mask"), ("rejected_input_ids", "rejected_loss_mask"))
TOKEN_COLUMNS = tuple(name for side in SIDES for name in side)
FURTHER_COLUMNS: dict[ShardKind, tuple[pa.Field, ...]] = {
    "causal": (),
    "preference": (
        pa.field("rejected_input_ids", pa.list_(pa.int32())),
        pa.field("rejected_loss_mask", pa.list_(pa.bool_())),
    ),
    "unpaired": (pa.field("desirable", pa.bool_(), nullable=False),),
}


def shard_schema(kind: ShardKind = "causal", images: bool = False) -> pa.Schema:
    """The Arrow schema of one shard; format and version stand in its metadata, the Parquet footer.

    Args:
        kind: of the rows; some kinds have further columns.
        images: whether rows have pictures.
    """
    schema = COLUMNS
    for field in FURTHER_COLUMNS[kind]:
        schema = schema.append(field)
    if images:
        schema = schema.append(IMAGES_FIELD)
    return schema.with_metadata(
        {"format": SHARD_FORMAT, "format_version": str(SHARD_FORMAT_VERSION), "kind": kind}
    )


def shard_file_name(split: str, index: int) -> str:
    """`shard-00000.parquet` (train split) or `evaluation-00000.parquet`."""
    return f"{FILE_STEMS[split]}-{index:05d}.parquet"
