"""Keeps libraries from reporting on import what concerns nobody here."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Call before torch, transformers, PEFT or DeepSpeed are imported.

    DeepSpeed guesses the accelerator aloud, bitsandbytes misses CPU kernels, transformers finds
    that PEFT calls an old name and draws a bar for each file.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
