"""Weights that compressed-tensors holds (https://github.com/vllm-project/compressed-tensors).

Beside a module's `weight_packed` or `weight` lies `weight_scale`: one for all of it, for each row,
each group of inputs, or each block. What is packed, and into what, the tensors' types tell; of
config.json only the numbers of bits and the sizes of blocks are asked. Read against
compressed-tensors 0.20.1, and transformers 5.23, `integrations/compressed_tensors.py`.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headrace.schemas.errors import DataError
from headrace.trainer.architecture.model_files import StoredTensor
from headrace.trainer.stored.codes import WORD, Scales, e2m1, fill, powers_of_two, unpack_words
from headrace.trainer.stored.stored_weight import Parts, StoredFormat, StoredWeight

PLAIN_CODES = ("F8_E4M3", "F8_E5M2", "I8")
FORMATS = {
    "dense",
    "float-quantized",
    "int-quantized",
    "mixed-precision",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
}
# part -> what follows "weight" in the name; of these only the scales are always there
OTHERS = {
    "scales": "_scale",
    "zeros": "_zero_point",
    "shape": "_shape",
    "whole_scale": "_global_scale",
    "groups": "_g_idx",
}
EXPERT = re.compile(r"\.experts\.\d+\.")


class CompressedTensors(StoredFormat):
    """`compressed-tensors`: integers and floats of 8 bits, packed integers, NVFP4 and MXFP4."""

    def __init__(self, settings: Mapping[str, Any], path: str) -> None:
        super().__init__(settings, path)
        sparsity = settings.get("sparsity_config") or {}
        for name in (settings.get("format"), *(part.get("format") for part in self.groups())):
            if name not in (None, *FORMATS):
                raise self.refusal(f"in the format {name} of compressed-tensors, which is not read")
        if sparsity.get("format") not in (None, "dense"):
            raise self.refusal(f"and stored as {sparsity['format']}, which is not read")
        if (settings.get("transform_config") or {}).get("config_groups"):
            raise self.refusal("and rotated (transform_config), which is not undone")

    def groups(self) -> Iterator[Mapping[str, Any]]:
        """Yield the records of how some of the weights are quantized."""
        for group in (self.settings.get("config_groups") or {}).values():
            if isinstance(group, Mapping):  # else the name of a scheme with its targets
                yield group

    def wished(self, key: str) -> list[Any]:
        """List the values of a setting of weights, over all groups."""
        found = ((group.get("weights") or {}).get(key) for group in self.groups())
        return [value for value in found if value is not None]

    def weights(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredWeight]:
        """Return codes that have scales beside them."""
        found = {}
        for name, stored in tensors.items():
            weight = name.removesuffix("_packed")
            packed = weight != name
            if not weight.endswith("weight") or f"{weight}_scale" not in tensors:
                continue
            if packed or stored.dtype in PLAIN_CODES:
                others = {part: weight + suffix for part, suffix in OTHERS.items()}
                parts = {part: other for part, other in others.items() if other in tensors}
                make = self.unpacked if packed else self.multiplied
                named = partial(make, f"{stored.path}: {weight}")
                found[weight] = StoredWeight({"codes": name, **parts}, named)
        return found

    def unpacked(self, name: str, parts: Parts, dtype: torch.dtype) -> Tensor:
        """Return a packed weight: of integers in words, or of two 4-bit floats a byte."""
        if parts["codes"].dtype == torch.int32:
            return self.integers(name, parts, dtype)
        codes, scales = parts["codes"], parts["scales"]
        if scales.dtype == torch.uint8:
            scales = powers_of_two(scales)
        scales = scales.to(torch.bfloat16)
        if "whole_scale" in parts:
            scales = scales / parts["whole_scale"]
        shape = (codes.shape[0], 2 * codes.shape[1])
        out = torch.empty(shape, dtype=torch.bfloat16, device=codes.device)
        return fill(out, codes, self.scales(name, shape, scales), e2m1).to(dtype)

    def multiplied(self, name: str, parts: Parts, dtype: torch.dtype) -> Tensor:
        """Return 8-bit codes times their scales, as compressed-tensors in the scales' type; floats
        of experts in float32, as transformers.
        """
        codes, scales = parts["codes"], parts["scales"]
        if scales.dtype == torch.uint8:
            scales = powers_of_two(scales).to(torch.bfloat16)
        if codes.is_floating_point() and EXPERT.search(name):
            scales = scales.float()
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        return fill(out, codes, self.scales(name, codes.shape, scales, parts))

    def integers(self, name: str, parts: Parts, dtype: torch.dtype) -> Tensor:
        """Return integers that are packed along the inputs, one after the other."""
        words, scales = parts["codes"], parts["scales"]
        rows, count = words.shape
        stored = parts["shape"].tolist() if "shape" in parts else []
        bits = self.bits(name, count, stored[1] if stored else None)
        columns = stored[1] if stored else count * WORD // bits
        middle = 1 << (bits - 1)
        parts = dict(parts)
        if "zeros" in parts and parts["zeros"].dtype == torch.int32:
            parts["zeros"] = unpack_words(parts["zeros"].t(), bits, rows).t() - middle

        def decode(piece: Tensor) -> Tensor:
            return unpack_words(piece, bits, columns) - middle

        out = torch.empty(rows, columns, dtype=dtype, device=words.device)
        return fill(out, words, self.scales(name, (rows, columns), scales, parts), decode)

    def bits(self, name: str, words: int, columns: int | None) -> int:
        """Return the bits of an integer: those of the config's that fill so many words."""
        wished = {int(bits) for bits in self.wished("num_bits")}
        if columns is not None:
            wished = {bits for bits in wished or range(1, 9) if -(-columns * bits // WORD) == words}
        if len(wished) != 1:
            raise DataError(
                f"{name} has {words} words a row, which num_bits in config.json do not account "
                "for; fetch the model again"
            )
        return wished.pop()

    def scales(
        self, name: str, shape: tuple[int, ...], scales: Tensor, parts: Parts | None = None
    ) -> Scales:
        """Return scales with the rows and columns of the block that each is for."""
        zeros, groups = (parts or {}).get("zeros"), (parts or {}).get("groups")
        while scales.ndim < 2:
            scales = scales.unsqueeze(-1)
            zeros = None if zeros is None else zeros.unsqueeze(-1)
        if groups is not None and bool((groups < 0).any()):  # not set
            groups = None
        if scales.shape[0] in (1, shape[0]) and shape[1] % scales.shape[1] == 0:
            rows = 1 if scales.shape[0] == shape[0] else shape[0]
            columns = shape[1] // scales.shape[1]
            return Scales(scales, rows, columns, zeros, column_blocks=groups)
        for rows, columns in self.wished("block_structure"):
            if scales.shape == (-(-shape[0] // rows), -(-shape[1] // columns)):
                return Scales(scales, rows, columns, zeros)
        raise DataError(
            f"{name} has scales of shape {list(scales.shape)}, which do not fit its own, "
            f"{list(shape)}; fetch the model again"
        )
