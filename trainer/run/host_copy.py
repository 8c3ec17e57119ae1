"""Values on their way from the device to the host, which goes on meanwhile."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class HostCopy:
    """Begins to copy a tensor; `get` waits for that copy and nothing that was queued after it."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor.detach().to("cpu", non_blocking=True)  # to pinned memory
        self._done = None
        if tensor.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    def get(self) -> NDArray[Any]:
        """The values, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        values: NDArray[Any] = self._values.numpy()
        return values
