"""Rows of numbers in e4m3, each with one scale: what 8-bit products take."""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest number of e4m3
SMALLEST_SCALE = 1e-12  # rows of zeros stay zeros


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in e4m3 and the scale of each row.

    Args:
        x: [rows, columns], any floating type.

    Returns:
        codes: [rows, columns] e4m3; scales: [rows, 1] float32; x is about codes * scales.
    """
    scales = e4m3_scales(x)
    return (x.float() / scales).to(E4M3), scales


def e4m3_scales(x: Tensor) -> Tensor:
    """Return [rows, 1] float32: what brings the largest number of each row of x to e4m3's."""
    return (x.float().abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
