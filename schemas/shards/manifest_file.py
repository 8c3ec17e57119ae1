"""The manifest of a shard directory on disk: written last, and checked when it is read."""

import json
from pathlib import Path

from pydantic import ValidationError

from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.json_text import parse_json
from headrace.schemas.named_files import check_inside, read_regular
from headrace.schemas.outside_text import shown
from headrace.schemas.publish import write_atomic
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.shard_format import MANIFEST_NAME, SHARD_FORMAT, SHARD_FORMAT_VERSION

MAX_MANIFEST_BYTES = 1 << 30


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Publish the manifest with a checksum over its own content. Call it last."""
    body = manifest.model_dump(mode="json")
    body["manifest_sha256"] = fingerprint(body)
    write_atomic(directory / MANIFEST_NAME, json.dumps(body, indent=1, ensure_ascii=False) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        DataError: missing, not JSON, edited by hand, of another version, or with unknown fields.
    """
    path = directory / MANIFEST_NAME
    if not path.exists():
        raise missing_manifest(path)
    manifest = parse_manifest(read_regular(path, MAX_MANIFEST_BYTES), path)
    for shard in manifest.shards:
        check_inside(directory / shard.file, directory)
    return manifest


def missing_manifest(path: Path | str) -> DataError:
    """Return the error for a directory without a manifest."""
    return DataError(f"{path}: not found; run `headrace prepare` to the end, or correct the path")


def parse_manifest(content: bytes, path: Path | str) -> Manifest:
    """The manifest in a file's bytes; `path` is for messages. Raises as `read_manifest`."""
    body = parse_json(content, path, "; prepare the directory again")
    if not isinstance(body, dict) or body.get("format") != SHARD_FORMAT:
        raise DataError(f'{path}: not a shard manifest (no "format": "{SHARD_FORMAT}")')
    if body.get("format_version") != SHARD_FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {shown(body.get('format_version'))}, "
            f"this release reads {SHARD_FORMAT_VERSION}"
        )
    checksum = body.pop("manifest_sha256", None)
    if checksum != fingerprint(body):
        raise DataError(
            f"{path}: edited or damaged (its checksum differs); prepare the directory again"
        )
    try:
        return Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {where}: {first['msg']}") from None
