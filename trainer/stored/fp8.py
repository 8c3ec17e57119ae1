"""8-bit floats with a scale for each block of a weight, each row of it, or all of it.

The layout of DeepSeek-V3 (https://huggingface.co/deepseek-ai/DeepSeek-V3), which transformers calls
`fp8`: a weight `X`, and `X_scale_inv` with what its codes are multiplied by. Read against
transformers 5.23, `integrations/finegrained_fp8.py` and `integrations/fbgemm_fp8.py`.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from headrace.schemas.errors import DataError
from headrace.trainer.architecture.model_files import StoredTensor
from headrace.trainer.stored.codes import Scales, e2m1, fill, powers_of_two
from headrace.trainer.stored.stored_weight import Parts, StoredFormat, StoredWeight

CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8")  # integers: two 4-bit floats each


class Fp8Blocks(StoredFormat):
    """`fp8` and `mxfp8`: blocks of `weight_block_size`; DeepSeek-V4's experts have 4-bit floats."""

    def weights(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredWeight]:
        """Return codes that have scales beside them."""
        found = {}
        for name, stored in tensors.items():
            scales = next((other for other in scale_names(name) if other in tensors), None)
            if scales is not None and stored.dtype in CODES:
                dequantize = partial(self.dequantize, f"{stored.path}: {name}")
                found[name] = StoredWeight({"codes": name, "scales": scales}, dequantize)
        return found

    def dequantize(self, name: str, parts: Parts, dtype: torch.dtype) -> Tensor:
        """Return codes times scales, in float32, rounded once."""
        codes, scales = parts["codes"], float_scales(parts["scales"])
        packed = codes.dtype in (torch.int8, torch.uint8)
        shape = (*codes.shape[:-1], codes.shape[-1] * (2 if packed else 1))
        if scales.ndim < 2:
            scales = scales.reshape(*[1] * codes.ndim)
        block = self.block(name, shape, scales.shape)
        out = torch.empty(shape, dtype=dtype, device=codes.device)
        for matrix, own, filled in zip(*(each(part) for part in (codes, scales, out)), strict=True):
            fill(filled, matrix, Scales(own, *block), e2m1 if packed else None)
        return out

    def block(self, name: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
        """Return the rows and columns of a block: the config's, or where the scales are of others
        what divides the weight.
        """
        sizes = list(zip(shape[-2:], scales[-2:], strict=True))
        wished = self.settings.get("weight_block_size")
        if wished and all(
            -(-size // block) == count for (size, count), block in zip(sizes, wished, strict=True)
        ):
            return int(wished[0]), int(wished[1])
        if any(not count or size % count for size, count in sizes):
            raise DataError(
                f"{name} has scales of shape {list(scales)}, which fit neither its own, "
                f"{list(shape)}, nor weight_block_size = {wished}; fetch the model again"
            )
        (rows, row_blocks), (columns, column_blocks) = sizes
        return rows // row_blocks, columns // column_blocks


class Fp8Rows(StoredFormat):
    """`fbgemm_fp8`: a scale for each output of a weight `X`, in `X_scale`."""

    def weights(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredWeight]:
        """Return codes that have scales beside them."""
        return {
            name: StoredWeight({"codes": name, "scales": f"{name}_scale"}, rows_times_scales)
            for name, stored in tensors.items()
            if f"{name}_scale" in tensors and stored.dtype in CODES[:2]
        }


def rows_times_scales(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Return codes times the scales that broadcast over them, in float32, rounded once."""
    codes, scales = parts["codes"], parts["scales"].float()
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    stack = codes.view(-1, *codes.shape[-2:])
    own = scales.expand(*codes.shape[:-2], *scales.shape[-2:]).reshape(-1, *scales.shape[-2:])
    for matrix, of_it, filled in zip(stack, own, each(out), strict=True):
        rows, columns = (
            1 if count > 1 else size for size, count in zip(matrix.shape, of_it.shape, strict=True)
        )
        fill(filled, matrix, Scales(of_it, rows, columns))
    return out


def scale_names(name: str) -> list[str]:
    """List the names that the scales of a weight may have: transformers', DeepSeek-V4's and
    Mistral's.
    """
    stem = name.removesuffix("weight")
    named = [f"{stem}scale", f"{stem}qscale_weight"] if stem != name else []
    return [f"{name}_scale_inv", *named]


def float_scales(scales: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents."""
    return powers_of_two(scales) if scales.dtype == torch.uint8 else scales.float()


def each(stack: Tensor) -> Tensor:
    """Return a matrix or any stack of them as a stack with one dimension."""
    return stack.view(-1, *stack.shape[-2:])
