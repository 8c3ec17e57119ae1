"""4-bit floats of bitsandbytes, in blocks that share a scale: NF4 and FP4."""

from typing import Any, Self

import torch
from torch import Tensor

from headrace.kernels.dequantize import block_scales, dequantize
from headrace.schemas.errors import ConfigError
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.quantized.weight import SCALE_BITS, QuantizedWeight
from headrace.trainer.stored.bitsandbytes_library import bitsandbytes_functions

BLOCK = 64  # values that share a scale, as transformers has bitsandbytes do it
NESTED_BLOCK = 256  # scales that share one
NESTED_BLOCKS = (64, 128)  # smaller ones that bitsandbytes' kernels take
PIECE = 1 << 20  # weights that are quantized at a time, as whole blocks: it takes 25 bytes for each


class Nf4(QuantizedWeight):
    """Packed 4-bit codes; the scales may be quantized themselves.

    Buffers: codes; scales, one a block, or with double quantization scale_codes, scale_table,
    nested_scales and scale_mean.
    """

    kernel = "nf4"
    parts = ("codes", "scales", "scale_codes", "scale_table", "nested_scales", "scale_mean")
    packages = ("bitsandbytes",)

    @classmethod
    def make(
        cls,
        value: Tensor,
        name: str,
        config: QuantizationConfig,
        dtype: torch.dtype,
        *,
        piece: int = PIECE,
    ) -> Self:
        """Quantize a matrix where it lies, a piece at a time, from float32."""
        functions = bitsandbytes_functions()
        storage = getattr(torch, config.storage_type)
        if value.numel() % (2 * storage.itemsize):
            raise ConfigError(
                f'quantization.storage_type = "{config.storage_type}": {name} has {value.numel()} '
                'weights, which do not fill it; use "uint8", or skip_modules'
            )
        pieces = [
            functions.quantize_4bit(part.float(), blocksize=BLOCK, quant_type=cls.kernel)
            for part in value.detach().reshape(-1).split(piece)
        ]
        codes = torch.cat([codes for codes, _ in pieces]).view(-1).view(storage).unsqueeze(1)
        scales = torch.cat([state.absmax for _, state in pieces])
        if not config.double_quantization:
            return cls(value.shape, {"codes": codes, "scales": scales}, {"block": BLOCK})
        mean = scales.mean()
        scale_codes, nested = functions.quantize_blockwise(scales - mean, blocksize=NESTED_BLOCK)
        buffers = {
            "codes": codes,
            "scale_codes": scale_codes,
            "scale_table": nested.code,
            "nested_scales": nested.absmax,
            "scale_mean": mean,
        }
        return cls(value.shape, buffers, {"block": BLOCK, "nested_block": NESTED_BLOCK})

    @classmethod
    def make_stack(
        cls, value: Tensor, name: str, config: QuantizationConfig, dtype: torch.dtype
    ) -> Self:
        """Quantize a stack as one matrix: blocks do not depend on where a matrix ends."""
        return cls.make(value, name, config, dtype)

    @classmethod
    def from_state(cls, codes: Tensor, state: Any) -> Self:
        """Return a weight from bitsandbytes' own record of one."""
        if not state.nested:
            return cls(
                state.shape, {"codes": codes, "scales": state.absmax}, {"block": state.blocksize}
            )
        nested = state.state2
        buffers = {
            "codes": codes,
            "scale_codes": state.absmax,
            "scale_table": nested.code,
            "nested_scales": nested.absmax,
            "scale_mean": state.offset,
        }
        settings = {"block": state.blocksize, "nested_block": nested.blocksize}
        return cls(state.shape, buffers, settings)

    @classmethod
    def check_part(
        cls, name: str, shape: torch.Size, dim: int, ranks: int, config: QuantizationConfig
    ) -> None:
        columns = shape[-1] // ranks if dim else shape.numel() // ranks
        if columns % BLOCK:
            raise ConfigError(
                f"tensor_parallel = {ranks}: parts of {name} have {columns} "
                f"{'inputs' if dim else 'weights'}, which are no multiple of the {BLOCK} that "
                "share a scale; add it to quantization.skip_modules"
            )

    def part(self, dim: int, rank: int, ranks: int) -> Self:
        """Return a rank's part: blocks stay those of the whole.

        Scales that are quantized themselves stay so where their blocks can be cut as well.
        """
        block, rows = self.settings["block"], 1 if dim == 0 else self.shape[0]

        def cut(flat: Tensor) -> Tensor:
            split = flat.reshape(rows, ranks, -1)
            return split[:, rank].reshape(-1).clone()

        shape = list(self.shape)
        shape[dim] //= ranks
        held = self.buffers_by_name
        codes = cut(held["codes"].view(torch.uint8)).view(held["codes"].dtype).unsqueeze(1)
        nested = self._nested_part(rows, ranks)
        if nested is None:
            parts = {"codes": codes, "scales": cut(block_scales(*self.packed))}
            made = type(self)(torch.Size(shape), parts, {"block": block})
            return self._with_row_scales(made, dim, rank, ranks)
        parts = {"codes": codes, "scale_codes": cut(held["scale_codes"])}
        own = held["nested_scales"]
        parts["nested_scales"] = cut(own) if rows == 1 else own.clone()
        parts |= {name: held[name] for name in ("scale_table", "scale_mean")}
        made = type(self)(torch.Size(shape), parts, {"block": block, "nested_block": nested})
        return self._with_row_scales(made, dim, rank, ranks)

    def _nested_part(self, rows: int, ranks: int) -> int | None:
        """Return how many scales share one in a part; None where they are no longer quantized.

        Args:
            rows: that are cut each by itself.
        """
        nested, held = self.settings.get("nested_block"), self.buffers_by_name
        if nested is None:
            return None
        in_row = held["scale_codes"].numel() // rows
        if rows == 1:
            return nested if in_row // ranks % nested == 0 else None
        small = nested // ranks
        return small if nested % in_row == 0 and small in NESTED_BLOCKS else None

    @classmethod
    def bits(cls, name: str, shape: torch.Size, config: QuantizationConfig) -> float:
        """Return 4 and the share of the scales."""
        if config.double_quantization:
            table = SCALE_BITS * NESTED_BLOCK / shape.numel()
            return 4 + 8 / BLOCK + SCALE_BITS / (BLOCK * NESTED_BLOCK) + table
        return 4 + SCALE_BITS / BLOCK

    @property
    def packed(self) -> tuple[list[Tensor], list[int]]:
        """Codes as bytes, whatever they are stored as, and the scales."""
        codes, *scales = self.kernel_tensors()
        return [codes.view(torch.uint8), *scales], list(self.settings.values())

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows alone where each is a number of whole blocks with scales of its own."""
        columns, block = self.shape[1], self.settings["block"]
        if columns % block or "scales" not in self._buffers:
            return super().rows(ids, dtype)
        codes, scales = (part.view(self.shape[0], -1) for part in self.packed[0])
        picked = [codes[ids.flatten()].view(-1, 1), scales[ids.flatten()].flatten()]
        found = dequantize(picked, self.kernel, (ids.numel(), columns), [block], dtype)
        return found.view(*ids.shape, columns)


class Fp4(Nf4):
    """The same with the codes of a 4-bit float with an exponent."""

    kernel = "fp4"
