"""The one place that imports bitsandbytes, when it is first used; read against 0.50.2."""

import logging
import sys
from functools import cache
from typing import Any

from headrace.schemas.train.quantization_config import check_installed


@cache
def bitsandbytes_functions() -> Any:
    """Return `bitsandbytes.functional`.

    On CPUs with bfloat16 units its import fetches a kernel from the hub through the package
    `kernels`; nothing from outside is to be run, so that the package is hidden meanwhile.
    """
    check_installed("bnb")
    hidden = sys.modules.get("kernels")
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    log.disabled = True
    try:
        import bitsandbytes.functional
    finally:
        log.disabled = False
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden
    return bitsandbytes.functional
