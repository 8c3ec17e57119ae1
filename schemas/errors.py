"""The error tree. A user's mistake raises one of these, as one line that says what to do.

Addresses in messages are shown without the credentials that they hold.
"""

import re
from urllib.parse import unquote_plus

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


class HeadraceError(Exception):
    """Base of all errors meant for the user: the message names file, line and remedy.

    Addresses in it are shown without the credentials that they hold.
    """

    def __str__(self) -> str:
        return redact(super().__str__())


class ConfigError(HeadraceError):
    """A config file, a command line override or a combination of settings is wrong."""


class DataError(HeadraceError):
    """An input, a shard directory or a model directory is missing, damaged or does not match."""


class OutputError(HeadraceError):
    """A file or directory cannot be written."""


class StorageError(HeadraceError):
    """A storage does not answer, or refuses, however often it is asked."""


class CheckpointError(HeadraceError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class TrainingError(HeadraceError):
    """Training cannot go on, for example because the loss is not a number."""


def install_hint(extra: str) -> str:
    """Return what to do about a missing library; the package itself is on no index yet."""
    return f"run in a clone of Headrace: pip install '.[{extra}]'"


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
