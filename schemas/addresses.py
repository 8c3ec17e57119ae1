"""Addresses that may hold credentials: checked when they are given, and saved without them."""

import hashlib
import re
from typing import Annotated
from urllib.parse import parse_qsl

from pydantic import AfterValidator

from headrace.schemas.config_model import Text
from headrace.schemas.errors import CREDENTIAL, OPTIONS, USER, is_secret, redact_url


def recorded(url: str) -> str:
    """Return an address as it may be saved: redacted, yet different for different files.

    Parameters that are no credentials (`?id=7`) choose a file; their hash stands behind a `#`. Of
    an address that is signed anew nothing changes.
    """
    shown = redact_url(url) if "://" in url else url
    if shown == url:
        return url
    pairs = parse_qsl(url.partition("?")[2], keep_blank_values=True)
    chosen = [pair for pair in pairs if pair[0] not in OPTIONS and not CREDENTIAL.search(pair[0])]
    if not chosen:
        return shown
    return f"{shown}#{hashlib.sha256(repr(chosen).encode()).hexdigest()[:12]}"


def check_address(url: str) -> str:
    """Return an address as it is, unless it holds a password or a key.

    Raises:
        ValueError: it does; says where credentials belong.
    """
    found = USER.search(url) if "://" in url else None
    if found is not None and is_secret(found):
        raise ValueError(
            f"{redact_url(url)}: credentials do not belong into an address; {remedy(url)}"
        )
    names = [name for name, _ in parse_qsl(url.partition("?")[2], keep_blank_values=True)]
    keys = [name for name in names if re.search("secret|access_?key|session_?token", name, re.I)]
    if keys and not url.startswith(("http://", "https://")):
        raise ValueError(
            f"{redact_url(url)}: {keys[0]} does not belong into an address; {remedy(url)}"
        )
    return url


Address = Annotated[Text, AfterValidator(check_address)]  # a path or a URL


def remedy(url: str) -> str:
    """Return where the credentials of a kind of storage belong."""
    scheme = url.partition("://")[0]
    if scheme == "s3":
        return (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write them to ~/.aws/credentials"
        )
    if scheme in ("gs", "gcs"):
        return "set GOOGLE_APPLICATION_CREDENTIALS to the file that holds them"
    if scheme in ("http", "https"):
        return "use a signed address, or download the file"
    return "set the environment variables of its package"
