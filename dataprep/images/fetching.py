"""The bytes of pictures: from a folder, from rows themselves, from storages."""

import base64
import binascii
import os
import re
from http.client import HTTPException
from pathlib import Path

import pyarrow as pa

from headrace.dataprep.images.picture import PictureError
from headrace.dataprep.images.references import Reference
from headrace.dataprep.input.remote import is_remote, open_remote, split_query
from headrace.schemas.errors import DataError
from headrace.schemas.named_files import check_inside, check_plain, open_regular
from headrace.schemas.outside_text import shown
from headrace.schemas.prepare.images_config import ImagesConfig

DATA_URI = re.compile(r"data:[\w.+/-]*(;[\w=.-]+)*;base64,", re.ASCII)
LONGEST_ADDRESS = 4096


def fetch(reference: Reference, config: ImagesConfig) -> bytes:
    """Return the bytes of a picture.

    Raises:
        PictureError: it is not there, may not be read, or is too large.
    """
    limit = config.max_bytes
    if reference.data is not None:
        return limited(reference.data, limit, "the row's own bytes")
    address = reference.address or ""
    if found := DATA_URI.match(address):
        return decode_base64(address[found.end() :], limit)
    if not address or len(address) > LONGEST_ADDRESS or "\0" in address:
        raise PictureError("no picture", f"{shown(address)} is no address")
    if is_remote(address):
        return fetch_remote(address, config)
    if config.folder is None:
        raise PictureError(
            "path without a folder", f"{shown(address)}: set folder in [images] to read files"
        )
    if is_remote(config.folder):
        return read_remote(below(config.folder, plain(address)), limit)
    return read_file(Path(config.folder), plain(address), limit)


def plain(name: str) -> str:
    """Return a path that stays below its folder.

    Raises:
        PictureError: it does not.
    """
    try:
        return check_plain(name)
    except ValueError as error:
        raise PictureError("path escapes the folder", str(error)) from None


def limited(data: bytes, limit: int, what: str) -> bytes:
    """Return bytes that are there, and not too many."""
    if not data:
        raise PictureError("empty picture", f"{what}: no byte")
    if len(data) > limit:
        raise PictureError("picture too large", f"{what}: more than max_bytes = {limit}")
    return data


def decode_base64(text: str, limit: int) -> bytes:
    """Return the bytes of a data URI."""
    if len(text) * 3 // 4 > limit + 3:
        raise PictureError("picture too large", f"a data URI: more than max_bytes = {limit}")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError("damaged data URI", str(error)) from None
    return limited(data, limit, "a data URI")


def read_file(folder: Path, name: str, limit: int) -> bytes:
    """Return the bytes of a file below a folder; links that leave it are not followed."""
    path = folder / name
    try:
        check_inside(path, folder)
    except (DataError, OSError, RuntimeError):
        raise PictureError(
            "path escapes the folder", f"{shown(name)} is a link that leaves the folder"
        ) from None
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return limited(file.read(limit + 1), limit, name)
    except DataError:
        raise PictureError("no regular file", shown(name)) from None
    except FileNotFoundError:
        raise PictureError("missing picture", f"{shown(name)} is not in the folder") from None
    except OSError as error:
        raise PictureError("unreadable picture", f"{shown(name)}: {error.strerror}") from None


def fetch_remote(address: str, config: ImagesConfig) -> bytes:
    """Return the bytes at a URL that the config lets rows name."""
    for allowed in (*config.addresses, *([config.folder] if config.folder else [])):
        start = f"{split_query(allowed)[0].rstrip('/')}/"
        if address.startswith(start):
            return read_remote(below(allowed, address.removeprefix(start)), config.max_bytes)
    raise PictureError(
        "address not allowed", f"{shown(address)}: begins with none of addresses in [images]"
    )


def below(start: str, name: str) -> str:
    """Return the URL of a name below another URL, whose options stay behind it."""
    url, options = split_query(start)
    return f"{url.rstrip('/')}/{name}{options}"


def read_remote(address: str, limit: int) -> bytes:
    """Return the bytes at a URL.

    Raises:
        PictureError: it does not answer, or not with a picture that may be read.
    """
    try:
        with open_remote(address) as stream:
            return limited(stream.read(limit + 1), limit, address)
    except (DataError, OSError, HTTPException, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PictureError("unreachable picture", reason) from None
