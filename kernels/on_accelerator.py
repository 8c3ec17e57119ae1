"""The choice between a kernel that is compiled for an accelerator and its plain twin."""

from torch import Tensor


def on_accelerator(tensor: Tensor) -> bool:
    """Return whether a tensor lies on a device that Triton compiles for."""
    return tensor.device.type not in ("cpu", "meta")
