"""Integers in groups of inputs, packed in words of 32 bits: GPTQ's and AWQ's layouts.

Both hold a matrix with its inputs first: `qweight` (codes), `qzeros` (codes that stand for 0) and
`scales`, one a group of inputs and output. GPTQ packs codes along the inputs and zeros along the
outputs, in order; AWQ both along the outputs, eight codes of a word in an order of its own. The
product is of the scales' type, as in both libraries. Read against GPT-QModel 7.7,
`nn_modules/qlinear`, and AutoAWQ 0.2.9, `utils/packing_utils.py`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headrace.schemas.errors import DataError
from headrace.trainer.architecture.model_files import StoredTensor
from headrace.trainer.stored.codes import WORD, Scales, fill, unpack_words
from headrace.trainer.stored.stored_weight import Parts, StoredFormat, StoredWeight

PARTS = {"codes": "qweight", "zeros": "qzeros", "scales": "scales"}
GPTQ_BITS = (2, 3, 4, 8)
AWQ_BITS = 4
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of an output's code in a word, from the lowest bits on


class Gptq(StoredFormat):
    """`gptq`: zero points are stored less one, unless the format is the second version."""

    def __init__(self, settings: Mapping[str, Any], path: str) -> None:
        super().__init__(settings, path)
        kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if kind not in ("gptq", "gptq_v2"):
            raise self.refusal(f"in the format {kind} of GPTQ, which is not read")
        self.less = int(kind == "gptq")

    def weights(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredWeight]:
        """Return codes that have zero points and scales beside them."""
        found = {}
        for stem, parts in packed_weights(tensors).items():
            if f"{stem}g_idx" in tensors:
                parts["groups"] = f"{stem}g_idx"
            path = tensors[parts["codes"]].path
            found[f"{stem}weight"] = StoredWeight(
                parts, partial(self.dequantize, f"{path}: {stem}weight")
            )
        return found

    def dequantize(self, name: str, parts: Parts, dtype: torch.dtype) -> Tensor:
        """Return a weight, of [inputs, outputs] as it is stored turned about."""
        words, scales = parts["codes"], parts["scales"]
        outputs = words.shape[1]
        bits = self.bits(name, outputs, parts["zeros"].shape[1])
        inputs = words.shape[0] * WORD // bits
        groups, size = parts.get("groups"), inputs // scales.shape[0]
        zeros = unpack_words(parts["zeros"], bits, outputs) + self.less
        own = Scales(scales, size, 1, zeros & ((1 << bits) - 1), row_blocks=groups)

        def decode(piece: Tensor) -> Tensor:
            return unpack_words(piece.t(), bits, piece.shape[0] * WORD // bits).t()

        out = torch.empty(outputs, inputs, dtype=dtype, device=words.device)
        fill(out.t(), words, own, decode, (WORD, bits))
        return out

    def bits(self, name: str, outputs: int, words: int) -> int:
        """Return the bits of a code, the config's first, that zero points of so many words have;
        modules may differ.
        """
        for bits in (self.settings.get("bits"), *GPTQ_BITS):
            if bits in GPTQ_BITS and -(-outputs * bits // WORD) == words:
                return int(bits)
        raise DataError(
            f"{name} has {words} words of zero points for {outputs} outputs, which none of "
            f"{', '.join(map(str, GPTQ_BITS))} bits gives; fetch the model again"
        )


class Awq(StoredFormat):
    """`awq`: 4 bits, in the layout for matrix products ("gemm")."""

    def __init__(self, settings: Mapping[str, Any], path: str) -> None:
        super().__init__(settings, path)
        kind = str(settings.get("version") or settings.get("format") or "gemm").lower()
        bits = settings.get("bits", settings.get("w_bit", AWQ_BITS))
        if kind != "gemm" or bits != AWQ_BITS:
            raise self.refusal(f'by AWQ to {bits} bits as "{kind}"; read are {AWQ_BITS} as "gemm"')

    def weights(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredWeight]:
        """Return codes that have zero points and scales beside them."""
        packed = packed_weights(tensors)
        return {f"{stem}weight": StoredWeight(parts, awq_weight) for stem, parts in packed.items()}


def awq_weight(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Return a weight, of [inputs, outputs] as it is stored turned about."""
    words, scales = parts["codes"], parts["scales"]
    inputs, outputs = words.shape[0], words.shape[1] * WORD // AWQ_BITS
    own = Scales(scales, inputs // scales.shape[0], 1, awq_codes(parts["zeros"]))
    out = torch.empty(outputs, inputs, dtype=dtype, device=words.device)
    fill(out.t(), words, own, awq_codes)
    return out


def awq_codes(words: Tensor) -> Tensor:
    """Return [rows, 8 n] codes of [rows, n] words."""
    shifts = torch.tensor(AWQ_ORDER, dtype=torch.int32, device=words.device) * AWQ_BITS
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << AWQ_BITS) - 1)
    return codes.flatten(1)


def packed_weights(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, str]]:
    """Return the parts of packed weights by what stands before them in their names."""
    stems = [name.removesuffix("qweight") for name in tensors if name.endswith(".qweight")]
    parts = {stem: {part: stem + end for part, end in PARTS.items()} for stem in stems}
    return {
        stem: found for stem, found in parts.items() if all(n in tensors for n in found.values())
    }
