"""Addresses that may hold credentials: checked when they are given, and shown without them."""

import hashlib
import re
from urllib.parse import parse_qsl, unquote_plus

HIDDEN = "***"
SHORTEST_SECRET = 8  # characters
OPTIONS = frozenset({"anonymous", "endpoint_override", "region", "revision", "scheme"})
URL = re.compile(r"[A-Za-z][\w+.-]*://[^\s\"'<>|\\^`{}]*[^\s\"'<>|\\^`{}:;,.]")
USER = re.compile(  # a secret may hold slashes; a port is none
    r"(?P<scheme>\w+)://(?P<user>[^/?#@:]*:(?!\d+/)[^?#@]*|[^/?#@]*)@"
)
NAMED = ("s3", "http", "https")  # where even a name alone may be a key
PARAMETER = re.compile(r"(?P<name>[^?&#=]+)=(?P<value>[^&#;),]*)")
CREDENTIAL = re.compile(
    r"token|secret|signature|password|passwd|credential|auth|session|expires|policy|date"
    r"|(^|[^a-z])(api|access)?_?key|^(se|sig|sp|sr|sv|st|spr|skoid|sktid|ske|sks|skt|skv)$|^x-",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Return a text in which addresses have neither users nor values of their parameters.

    Options that a storage takes (`region`, `endpoint_override`, ...) stay readable.
    """
    return URL.sub(lambda found: redact_url(found[0]), text) if "://" in text else text


def redact_url(url: str) -> str:
    """Return one address without its user and the values of its parameters."""
    address, mark, query = url.partition("?")
    address = USER.sub(hide_user, address, count=1)
    return address + mark + PARAMETER.sub(hide_value, query)


def hide_user(found: re.Match[str]) -> str:
    """Return what stands in place of `scheme://user:password@`."""
    return f"{found['scheme']}://{HIDDEN}@" if is_secret(found) else found[0]


def is_secret(found: re.Match[str]) -> bool:
    """Return whether the user of an address is more than a name, as of Azure's containers."""
    return ":" in found["user"] or found["scheme"] in NAMED


def hide_value(found: re.Match[str]) -> str:
    """Return a parameter without its value, unless that is no secret by its name or length."""
    name = unquote_plus(found["name"])
    short = len(found["value"]) < SHORTEST_SECRET and not CREDENTIAL.search(name)
    return found[0] if name in OPTIONS or short else f"{found['name']}={HIDDEN}"


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
