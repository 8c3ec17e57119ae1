"""Drawn pictures, and small shard directories of rows that have some."""

import io
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from headrace.dataprep.passes.shard_writer import count_trained, describe_shard
from headrace.schemas.shards.manifest import (
    ImagesRecord,
    Manifest,
    PictureLedger,
    SourceRecord,
    TokenizerRecord,
    TokenLedger,
    settings_fingerprint,
)
from headrace.schemas.shards.manifest_file import write_manifest
from headrace.schemas.shards.parquet_options import parquet_options
from headrace.schemas.shards.shard_format import shard_file_name, shard_schema

COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220)}
SHAPES = ("circle", "square")


def draw(
    size: tuple[int, int], left: tuple[str, str], right: tuple[str, str] | None = None
) -> Image.Image:
    """A picture of one or two shapes, each a color and a shape, on white."""
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    width, height = size
    shapes = [left] if right is None else [left, right]
    for place, (color, shape) in enumerate(shapes):
        part = width / len(shapes)
        box = (part * (place + 0.2), height * 0.2, part * (place + 0.8), height * 0.8)
        (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=COLORS[color])
    return picture


def noise(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A picture of random values, smooth enough that no resizing hides a difference."""
    generator = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], channels)
    coarse = Image.fromarray(flat(generator.integers(0, 256, (9, 9, channels), np.uint8)))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).reshape(shape)
    mixed = smooth.astype(int) + generator.integers(-20, 20, shape)
    return Image.fromarray(flat(np.clip(mixed, 0, 255).astype(np.uint8)))


def flat(values: Any) -> Any:
    """Values of one channel without the axis of channels."""
    return values[..., 0] if values.shape[-1] == 1 else values


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture's file."""
    target = io.BytesIO()
    picture.save(target, kind, **options)
    return target.getvalue()


def tile(
    picture: int, tokens: int, image: Image.Image, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """One entry of the column: tile `image` of a picture of `size`, which is the tile's if None."""
    width, height = size or image.size
    return {
        "bytes": encoded(image),
        "picture": picture,
        "tokens": tokens,
        "width": width,
        "height": height,
    }


def images_record(family: str, settings: dict[str, Any], placeholder: int) -> ImagesRecord:
    """What a manifest says about its pictures."""
    return ImagesRecord(
        family=family,
        settings=settings,
        placeholder_id=placeholder,
        fingerprint=settings_fingerprint(family, settings),
    )


def write_picture_shards(
    folder: Path,
    rows: list[dict[str, Any]],
    record: ImagesRecord,
    *,
    vocabulary: int = 256,
    sequence_len: int = 256,
    rows_in_group: int = 4,
    evaluation: list[dict[str, Any]] | None = None,
) -> Manifest:
    """Write a shard directory of rows with pictures: a train file, and an evaluation file.

    Args:
        rows: `input_ids`, and as wanted `loss_mask`, `document_lengths`, `images` (of `tile`), and
            for pairs `rejected_input_ids` and `rejected_loss_mask`. Keys are their numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = "preference" if "rejected_input_ids" in rows[0] else "causal"
    splits = {"train": rows, **({"evaluation": evaluation} if evaluation else {})}
    shards, trained = [], 0
    for split, some in splits.items():
        table = as_table(some, kind)
        path = folder / shard_file_name(split, 0)
        with pq.ParquetWriter(path, table.schema, **parquet_options(kind, images=True)) as writer:
            for start in range(0, len(some), rows_in_group):
                writer.write_table(table.slice(start, rows_in_group))
        plan = SimpleNamespace(file=path.name, runs=SimpleNamespace(split=split))
        shards.append(describe_shard(path, plan))
        trained += count_trained(table)
    tokens = {shard.split: shard.tokens for shard in shards}
    pictures = {split: sum(map(count_pictures, some)) for split, some in splits.items()}
    count = sum(map(len, splits.values()))
    ledger = PictureLedger(pictures_in=sum(pictures.values()), pictures_out=pictures)
    manifest = Manifest(
        kind=kind,
        tokenizer=TokenizerRecord(
            fingerprint="none", vocabulary_size=vocabulary, special_tokens={}
        ),
        sequence_len=sequence_len,
        packing="best_fit",
        seed=0,
        config_fingerprint="none",
        inputs_fingerprint="none",
        shards=shards,
        sources=[
            SourceRecord(
                name="drawn",
                documents=count,
                rejected_documents=0,
                rows=count,
                tokens=sum(tokens.values()),
                trained_tokens=trained,
                document_length_quantiles={},
            )
        ],
        ledger=TokenLedger(tokens_in=sum(tokens.values()), tokens_out=tokens, tokens_dropped={}),
        images=record.model_copy(update={"ledger": ledger}),
    )
    write_manifest(folder, manifest)
    return manifest


def count_pictures(row: dict[str, Any]) -> int:
    """Pictures of one row."""
    return len({entry["picture"] for entry in row.get("images") or []})


def as_table(rows: list[dict[str, Any]], kind: str) -> pa.Table:
    """Rows with every column of a shard."""
    schema = shard_schema(kind, images=True)
    whole = [
        {"loss_mask": None, "document_lengths": [len(row["input_ids"])], "control_class": None}
        | {"rejected_loss_mask": None, "images": None}
        | row
        | {"source": "drawn", "row_key": number}
        for number, row in enumerate(rows)
    ]
    columns = [
        pa.array([row[field.name] for row in whole], storage_type(field.type)).cast(field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def storage_type(kind: pa.DataType) -> pa.DataType:
    """The type that values are given as."""
    return pa.string() if pa.types.is_dictionary(kind) else kind


def random_rows(
    count: int, placeholder: int = 5, tokens: int = 4, size: int = 28, vocabulary: int = 64
) -> list[dict[str, Any]]:
    """Rows of one to three documents with none to three pictures each, one tile a picture."""
    chance = random.Random(0)
    rows = []
    for _ in range(count):
        ids: list[int] = []
        lengths, images = [], []
        for _ in range(chance.randint(1, 3)):
            document = [chance.randrange(6, vocabulary) for _ in range(chance.randint(2, 9))]
            for _ in range(chance.randint(0, 3)):
                image = noise((size, size), seed=chance.randrange(1 << 30))
                images.append(tile(len(images), tokens, image))
                document += [placeholder] * tokens + [chance.randrange(6, vocabulary)]
            ids += document
            lengths.append(len(document))
        mask = [token != placeholder for token in ids]
        rows.append(
            {"input_ids": ids, "loss_mask": mask, "document_lengths": lengths}
            | {"images": images or None}
        )
    return rows
