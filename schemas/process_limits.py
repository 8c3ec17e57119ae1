"""Standard streams and open files of a process, set right before anything else is opened."""

import logging
import os
import resource
import sys

from headrace.schemas.errors import ConfigError

STREAMS = {1: "stdout", 2: "stderr"}
FILES_NEEDED = 256  # of a process: sockets to the other ranks, libraries, shards
FILES_WANTED = 4096


def open_closed_streams() -> None:
    """Open closed streams on the null device: a file opened later would get their numbers.

    What nobody reads any more is dropped by logging without a traceback.
    """
    for descriptor, name in STREAMS.items():
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(null_device(descriptor), "w", encoding="utf-8"))
    logging.raiseExceptions = False


def null_device(descriptor: int) -> int:
    """Open the null device, under a number if it is free, and return the one it has."""
    opened = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(descriptor)
    except OSError:
        os.dup2(opened, descriptor)
        os.close(opened)
        return descriptor
    return opened


def allow_open_files() -> None:
    """Raise the limit of open files, which is inherited, as far as it may be.

    Raises:
        ConfigError: to less than a training process needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = wanted_limit(soft, hard)
    if wanted != soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def wanted_limit(soft: int, hard: int) -> int:
    """Return the limit of open files to have, given those of a process.

    Raises:
        ConfigError: it may have fewer than it needs.
    """
    unlimited = hard == resource.RLIM_INFINITY
    if not unlimited and hard < FILES_NEEDED:
        raise ConfigError(
            f"ulimit -n {hard}: a training process opens up to {FILES_NEEDED} files and sockets; "
            "raise the limit"
        )
    wanted = FILES_WANTED if unlimited else min(hard, FILES_WANTED)
    return soft if soft == resource.RLIM_INFINITY else max(soft, wanted)
