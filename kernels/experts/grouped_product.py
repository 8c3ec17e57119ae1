"""Products of sorted rows with one matrix for each group.

Where a group ends is known to the device alone: nothing waits for it.
"""

from itertools import pairwise

from torch import Tensor
from torch.nn import functional

from headrace.kernels.on_accelerator import on_accelerator

ALIGNMENT = 8  # numbers; the sizes that grouped products in half precision take are multiples of it


def grouped_product(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Return each row times its group's matrix.

    Args:
        x: [rows, k]; matrices: [groups, k, n], of any strides.
    """
    if not on_accelerator(x):
        return grouped_product_reference(x, matrices, offsets)
    columns = matrices.shape[2]
    product = functional.grouped_mm(_aligned(x, 1), _aligned(matrices, 2), offs=offsets)
    return product[:, :columns].contiguous()


def grouped_product_reference(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Return the same as `grouped_product`, group by group."""
    output = x.new_zeros(x.shape[0], matrices.shape[2])
    for group, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        output[start:end] = x[start:end] @ matrices[group]
    return output


def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Return [groups, m, n]: for each group, the transpose of its rows of a times those of b.

    Args:
        a: [rows, m]; b: [rows, n].
    """
    if not on_accelerator(a):
        return grouped_outer_reference(a, b, offsets)
    product = functional.grouped_mm(_aligned(a, 1).t(), _aligned(b, 1), offs=offsets)
    return product[:, : a.shape[1], : b.shape[1]].contiguous()


def grouped_outer_reference(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Return the same as `grouped_outer`, group by group."""
    output = a.new_zeros(offsets.shape[0], a.shape[1], b.shape[1])
    for group, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        output[group] = a[start:end].t() @ b[start:end]
    return output


def _aligned(x: Tensor, sizes: int) -> Tensor:
    """Return x with its last dimensions filled up with zeros, unless they fit: narrow adapters."""
    missing = [-size % ALIGNMENT for size in reversed(x.shape[-sizes:])]
    if not any(missing):
        return x
    return functional.pad(x, [value for size in missing for value in (0, size)])
