"""MXFP4 as gpt_oss has it: 4-bit floats (E2M1) in blocks of 32 that share a power of two.

A stack of experts' matrices `X`, inputs first in the model, is stored outputs first: `X_blocks`
[experts, outputs, blocks, 16] and `X_scales` [experts, outputs, blocks]. Read against transformers
5.23, `integrations/mxfp4.py`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from headrace.trainer.architecture.model_files import StoredTensor
from headrace.trainer.stored.codes import Scales, e2m1, fill, powers_of_two
from headrace.trainer.stored.stored_weight import Parts, StoredFormat, StoredWeight

BLOCKS, SCALES = "_blocks", "_scales"


class Mxfp4(StoredFormat):
    """`mxfp4`."""

    def weights(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredWeight]:
        """Return blocks that have scales beside them."""
        names = [name.removesuffix(BLOCKS) for name in tensors if name.endswith(BLOCKS)]
        return {
            name: StoredWeight({"codes": name + BLOCKS, "scales": name + SCALES}, stack_of_experts)
            for name in names
            if name + SCALES in tensors
        }


def stack_of_experts(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Return [experts, inputs, outputs]; its memory has the inputs of an output side by side."""
    codes, scales = parts["codes"].flatten(-2), powers_of_two(parts["scales"])
    experts, outputs, half = codes.shape
    block = 2 * half // scales.shape[-1]
    out = torch.empty(experts, outputs, 2 * half, dtype=dtype, device=codes.device)
    for matrix, own, filled in zip(codes, scales, out, strict=True):
        fill(filled, matrix, Scales(own, 1, block), e2m1)
    return out.transpose(1, 2)
