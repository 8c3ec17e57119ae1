"""Keeps libraries from reporting on import what concerns nobody here."""

import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Call before torch, transformers, PEFT or DeepSpeed are imported.

    DeepSpeed guesses the accelerator aloud, bitsandbytes misses CPU kernels, transformers finds
    that PEFT calls an old name and draws a bar for each file.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    from headrace.trainer.devices import device_type

    os.environ.setdefault("DS_ACCELERATOR", device_type())

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def import_without(*packages: str) -> None:
    """Import transformers and PEFT as if packages were not there; both remember the answer.

    They import bitsandbytes and HQQ for layers of their own, which takes two seconds and serves
    nothing in training: quantized weights are held by layers of ours.
    """
    absent = [name for name in packages if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # which stops its import
    try:
        import peft  # noqa: F401 (transformers with it)
    finally:
        for name in absent:
            del sys.modules[name]
