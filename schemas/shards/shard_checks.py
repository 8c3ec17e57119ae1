"""Checks of a shard file before its rows are decoded: its columns and its size."""

from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.schemas.shards.foreign_columns import ForeignColumns
from headrace.schemas.shards.manifest import Manifest, RowGroupRecord
from headrace.schemas.shards.parquet_pages import Read, check_pages, unpacked_bytes
from headrace.schemas.shards.shard_format import SHARD_FORMAT, SHARD_FORMAT_VERSION, shard_schema

OPTIONAL_COLUMNS = {"control_class"}  # that files of earlier releases of version 1 lack
MAX_UNPACKED_BYTES = 2 << 30  # of a row group, as the footer gives it
TOKEN_BYTES = 32  # of ids, mask and documents of one token each, as `unpacked_bytes` counts
ROW_BYTES = 128
GROUP_BYTES = 4 << 20  # names of sources, and what Parquet adds
PICTURE_TIMES = 4  # bytes of pictures and of their numbers, for one in the file

LISTS_OF_INTEGERS = ("input_ids", "labels", "document_lengths", "cu_seqlens", "position_ids")
LISTS_OF_FLAGS = ("loss_mask", "attention_mask")


def check_schema(schema: pa.Schema, manifest: Manifest) -> None:
    """Check the columns of a shard file, and the format that its footer names.

    Raises:
        ValueError: with the column, or the version.
    """
    if manifest.columns is None:
        check_format(schema, manifest)
        problems = wrong_columns(schema, schema_of(manifest))
    else:
        problems = wrong_foreign_columns(schema, manifest.columns)
    for problem in problems:
        raise ValueError(problem)


def schema_of(manifest: Manifest) -> pa.Schema:
    """Return the columns of the shards of a directory that `prepare` wrote."""
    return shard_schema(manifest.kind, manifest.images is not None)


def check_format(schema: pa.Schema, manifest: Manifest) -> None:
    """Check what the footer's metadata say."""
    wanted = {
        "format": SHARD_FORMAT,
        "format_version": str(SHARD_FORMAT_VERSION),
        "kind": manifest.kind,
    }
    found = schema.metadata or {}
    for key, value in wanted.items():
        given = found.get(key.encode(), b"").decode(errors="replace")
        if given != value:
            raise ValueError(f"its footer has {key} = {given!a}, this release reads {value!a}")


def wrong_columns(schema: pa.Schema, expected: pa.Schema) -> Iterator[str]:
    """Yield what differs from the shard format."""
    for field in expected:
        places = schema.get_all_field_indices(field.name)
        if not places and field.name not in OPTIONAL_COLUMNS:
            yield f"column {field.name} is missing"
        elif len(places) > 1:
            yield f"column {field.name} is there {len(places)} times"
        elif places and not schema.field(places[0]).type.equals(field.type):
            found = schema.field(places[0]).type
            yield f"column {field.name} holds {found}, the shard format {field.type}"


def wrong_foreign_columns(schema: pa.Schema, columns: ForeignColumns) -> Iterator[str]:
    """Yield columns that are missing, or hold something else than their role asks for."""
    for role, name in columns.model_dump(exclude={"padding_id"}).items():
        if name is None:
            continue
        places = schema.get_all_field_indices(name)
        if len(places) != 1:
            yield f"column {name} is {'missing' if not places else 'there more than once'}"
            continue
        kind = schema.field(places[0]).type
        if not fits_role(role, kind):
            yield f"column {name} holds {kind}, which cannot be {role}"


def fits_role(role: str, kind: pa.DataType) -> bool:
    """Return whether a column of this type can have a role among foreign columns."""
    if role == "row_key":
        return bool(pa.types.is_integer(kind))
    if role == "loss_mask" and pa.types.is_null(kind):  # no row has one
        return True
    if role not in LISTS_OF_INTEGERS + LISTS_OF_FLAGS:
        return not pa.types.is_nested(kind) or pa.types.is_dictionary(kind)
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return bool(pa.types.is_fixed_size_list(kind)) and fits_value(role, kind.value_type)
    return fits_value(role, kind.value_type)


def fits_value(role: str, kind: pa.DataType) -> bool:
    """Return whether lists of this type can have a role."""
    flags = role in LISTS_OF_FLAGS and pa.types.is_boolean(kind)
    return bool(flags or pa.types.is_integer(kind))


def check_size(
    group: pq.RowGroupMetaData, manifest: Manifest, record: RowGroupRecord, names: Iterable[str]
) -> None:
    """Check a row group's footer against its record, and against what may be unpacked at all.

    Args:
        names: columns that will be read.

    Raises:
        ValueError: other rows, or more bytes than so many rows and tokens take.
    """
    if group.num_rows != record.rows:
        raise ValueError(f"{group.num_rows} rows, the manifest says {record.rows}")
    size = sum(unpacked_bytes(column) for column in chunks(group, names))
    limit = MAX_UNPACKED_BYTES
    if manifest.columns is None:
        declared = TOKEN_BYTES * record.tokens + ROW_BYTES * record.rows + GROUP_BYTES
        if manifest.images is not None:
            declared += PICTURE_TIMES * record.bytes
        limit = min(limit, declared)
    if size > limit:
        raise ValueError(
            f"it unpacks to {size:,} bytes, at most {limit:,} are allowed for {record.rows:,} rows "
            f"of {record.tokens:,} tokens"
        )


def check_unpacked(group: pq.RowGroupMetaData, names: Iterable[str], read: Read) -> None:
    """Check that pages unpack to no more than the footer says. Raises ValueError."""
    for column in chunks(group, names):
        check_pages(column, read)


def chunks(group: pq.RowGroupMetaData, names: Iterable[str]) -> Iterator[pq.ColumnChunkMetaData]:
    """Yield the column chunks that belong to some columns."""
    wanted = set(names)
    prefixes = tuple(f"{name}." for name in wanted)
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema in wanted or column.path_in_schema.startswith(prefixes):
            yield column
