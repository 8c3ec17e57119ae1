"""The error tree. A user's mistake raises one of these, as one line that says what to do."""

from headrace.schemas.addresses import redact


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
