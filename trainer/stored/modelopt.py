"""Weights that NVIDIA's ModelOpt has quantized, as its exports for Hugging Face hold them.

NVFP4: two 4-bit floats a byte in `weight`, a scale in e4m3 for each 16 inputs in `weight_scale`,
and one for all of it in `weight_scale_2`. FP8: codes in `weight`, `weight_scale` of all of it, of
each row, or of each block. (https://github.com/NVIDIA/TensorRT-Model-Optimizer,
`export/quant_utils.py`.)
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from headrace.schemas.errors import DataError
from headrace.trainer.architecture.model_files import StoredTensor
from headrace.trainer.stored.codes import Scales, e2m1, fill
from headrace.trainer.stored.stored_weight import Parts, StoredFormat, StoredWeight

FLOATS = ("F8_E4M3", "F8_E5M2")


class ModelOpt(StoredFormat):
    """`modelopt`: NVFP4 and FP8, told apart by the tensors' types."""

    def weights(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredWeight]:
        """Return codes that have scales beside them.

        Raises:
            ConfigError: weights that expect scaled inputs, or packed integers.
        """
        found = {}
        for name, stored in tensors.items():
            scales, whole = f"{name}_scale", f"{name}_scale_2"
            if name.endswith("pre_quant_scale"):
                raise self.refusal(f"for scaled inputs ({name}), which is not read")
            if not name.endswith("weight") or scales not in tensors:
                continue
            parts = {"codes": name, "scales": scales}
            if stored.dtype == "U8":
                if tensors[scales].dtype not in FLOATS or whole not in tensors:
                    raise self.refusal(f"in packed integers ({name}), which is not read")
                parts["whole_scale"] = whole
            elif stored.dtype not in FLOATS:
                continue
            found[name] = StoredWeight(parts, partial(dequantize, f"{stored.path}: {name}"))
        return found


def dequantize(name: str, parts: Parts, dtype: torch.dtype) -> Tensor:
    """Return codes times scales, in float32, rounded once."""
    codes, scales = parts["codes"], parts["scales"].float()
    packed = "whole_scale" in parts
    if packed:
        scales = scales * parts["whole_scale"]
    while scales.ndim < 2:
        scales = scales.unsqueeze(-1)
    rows, columns = codes.shape[0], codes.shape[1] * (2 if packed else 1)
    row_blocks, column_blocks = scales.shape
    if rows % row_blocks or columns % column_blocks:
        raise DataError(
            f"{name} has scales of shape {list(scales.shape)}, which do not divide its own, "
            f"{[rows, columns]}; fetch the model again"
        )
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    own = Scales(scales, rows // row_blocks, columns // column_blocks)
    return fill(out, codes, own, e2m1 if packed else None)
