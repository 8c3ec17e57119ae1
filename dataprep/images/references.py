"""Pictures as rows name them: paths, addresses, data in place, and where they belong."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from headrace.dataprep.images.picture import PictureError
from headrace.schemas.outside_text import shown

MARKER = "<image>"  # a picture's place in a text, as LLaVA, jllm and many data sets write it
PICTURE_KINDS = ("image", "image_url", "input_image")
SOURCE_FIELDS = ("image", "image_url", "path", "url", "bytes", "base64", "data")
FIELDS = ("images", "image")  # of a row


class Reference(NamedTuple):
    """A picture as a row names it: its bytes, or an address (path, URL, data URI)."""

    address: str | None = None
    data: bytes | None = None


def read_reference(value: object, where: str) -> Reference:
    """Return the picture that a value of a row names.

    Raises:
        PictureError: it names none.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return Reference(data=bytes(value))
    if isinstance(value, str):
        return Reference(address=value)
    if isinstance(value, dict):
        if isinstance(value.get("base64"), str):
            return Reference(address=f"data:;base64,{value['base64']}")
        for name in ("bytes", *SOURCE_FIELDS):
            if value.get(name) is not None:
                return read_reference(value[name], where)
    raise PictureError("no picture", f"{where}: {shown(value)} names no picture")


def row_references(fields: Mapping[str, Any], field: str | None) -> list[Reference]:
    """Return the pictures that a row lists beside its messages.

    Args:
        field: the name of the list. Default: `images` or `image`.
    """
    names = [field] if field else FIELDS
    name = next((name for name in names if fields.get(name) is not None), None)
    if name is None:
        return []
    value = fields[name]
    items = value if isinstance(value, list) else [value]
    return [read_reference(item, f"{name}[{i}]") for i, item in enumerate(items) if item != ""]


def is_picture(part: object) -> bool:
    """Return whether a part of a content is a picture, or the place of one."""
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    return kind in PICTURE_KINDS or (kind is None and {*part} == {"bytes", "path"})


def listed_pictures(value: object) -> int:
    """Return how many pictures a field of a row lists."""
    return len(value) if isinstance(value, list) else int(bool(value))


def picture_bytes(value: object) -> int:
    """Return the bytes of pictures that a record holds itself."""
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, list):
        return sum(map(picture_bytes, value))
    return sum(map(picture_bytes, value.values())) if isinstance(value, dict) else 0


def count_pictures(value: object) -> int:
    """Return about how many pictures a record has: what cuts blocks, before they are read."""
    if isinstance(value, str):
        return value.count(MARKER)
    if isinstance(value, list):
        return sum(map(count_pictures, value))
    if not isinstance(value, dict):
        return 0
    return int(is_picture(value)) + sum(map(count_pictures, value.values()))
