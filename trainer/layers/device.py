"""Device tensors that a model makes of a batch: positions and masks of documents."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.trainer import devices


def position_ids(document_lengths: Sequence[Sequence[int]]) -> Tensor:
    """[b, s] int64 positions that restart at every document."""
    return torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in document_lengths]
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    if devices.is_accelerator(device):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def document_mask(
    document_lengths: Sequence[Sequence[int]],
    device: torch.device,
    bounds: tuple[int, int] | None = None,
) -> Tensor | None:
    """[b, 1, s, s] bool, true where a token may attend: earlier or same, in its own document.

    None when every row is one document, for which plain causal attention is the same and faster.

    Args:
        bounds: of a slice of the rows, if not all: its tokens, and as keys all up to its end.
    """
    if all(len(lengths) == 1 for lengths in document_lengths):
        return None
    documents = torch.stack(
        [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in document_lengths]
    )
    documents = to_device(documents, device)
    start, end = bounds or (0, documents.shape[1])
    same = documents[:, start:end].unsqueeze(2) == documents[:, :end].unsqueeze(1)
    return same.tril(start).unsqueeze(1)
