"""Quantizes one matrix, by the library that the config names.

This is the only file that calls bitsandbytes and HQQ; read against bitsandbytes 0.50.2 and HQQ
0.2.8. Both are imported when first used.
"""

import logging
import sys
from collections.abc import Container
from functools import cache
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.dequantize import HQQ_WORDS
from headrace.schemas.errors import ConfigError
from headrace.schemas.quantization_config import QuantizationConfig, check_installed
from headrace.trainer.model.quantized_weight import QuantizedWeight

BLOCK = 64  # values that share a scale, as transformers has bitsandbytes do it
NESTED_BLOCK = 256  # scales that share one
PIECE = 1 << 20  # weights that are quantized at a time, as whole blocks: it takes 25 bytes for each
INT8_RANGE = 127  # the largest code


@cache
def bitsandbytes_functions() -> Any:
    """`bitsandbytes.functional`.

    On CPUs with bfloat16 units its import fetches a kernel from the hub through the package
    `kernels`; nothing from outside is to be run, so that the package is hidden meanwhile.
    """
    check_installed("bnb")
    hidden = sys.modules.get("kernels")
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    log.disabled = True
    try:
        import bitsandbytes.functional
    finally:
        log.disabled = False
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden
    return bitsandbytes.functional


def quantize(
    value: Tensor, name: str, config: QuantizationConfig, dtype: torch.dtype
) -> QuantizedWeight:
    """Quantize a matrix on its device, from float32.

    Args:
        name: of the weight, which may have settings of its own.
        dtype: of the computation.

    Raises:
        ConfigError: settings that do not go with the matrix's shape, or a library that is missing.
    """
    value = value.detach()
    if config.backend == "hqq":
        return _by_hqq(value, name, config, dtype)
    functions = bitsandbytes_functions()
    if config.type == "int8":  # as bitsandbytes: from half precision
        codes, magnitudes, _ = functions.int8_vectorwise_quant(value.to(torch.float16, copy=True))
        return QuantizedWeight([codes, magnitudes], "int8", value.shape, [INT8_RANGE])
    storage = getattr(torch, config.storage_type)
    if value.numel() % (2 * storage.itemsize):
        raise ConfigError(
            f'quantization.storage_type = "{config.storage_type}": {name} has {value.numel()} '
            'weights, which do not fill it; use "uint8", or skip_modules'
        )
    pieces = [
        functions.quantize_4bit(piece.float(), blocksize=BLOCK, quant_type=config.type)
        for piece in value.reshape(-1).split(PIECE)
    ]
    codes = torch.cat([codes for codes, _ in pieces]).view(-1).view(storage).unsqueeze(1)
    magnitudes = torch.cat([state.absmax for _, state in pieces])
    if not config.double_quantization:
        return QuantizedWeight([codes, magnitudes], config.type, value.shape, [BLOCK])
    mean = magnitudes.mean()
    magnitude_codes, nested = functions.quantize_blockwise(
        magnitudes - mean, blocksize=NESTED_BLOCK
    )
    parts = [codes, magnitude_codes, nested.code, nested.absmax, mean]
    return QuantizedWeight(parts, config.type, value.shape, [BLOCK, NESTED_BLOCK])


def restore(tensors: dict[str, Tensor]) -> QuantizedWeight:
    """A weight as transformers saves it after bitsandbytes.

    Args:
        tensors: by what follows the weight's name in the file: "" for the codes themselves, "SCB",
            "absmax", "quant_state.bitsandbytes__nf4" ...
    """
    functions = bitsandbytes_functions()
    codes = tensors.pop("")
    if "SCB" in tensors:
        return QuantizedWeight([codes, tensors["SCB"]], "int8", codes.shape, [INT8_RANGE])
    state = functions.QuantState.from_dict(tensors, codes.device)
    if not state.nested:
        return QuantizedWeight(
            [codes, state.absmax], state.quant_type, state.shape, [state.blocksize]
        )
    nested = state.state2
    parts = [codes, state.absmax, nested.code, nested.absmax, state.offset]
    settings = [state.blocksize, nested.blocksize]
    return QuantizedWeight(parts, state.quant_type, state.shape, settings)


def _by_hqq(
    value: Tensor, name: str, config: QuantizationConfig, dtype: torch.dtype
) -> QuantizedWeight:
    check_installed("hqq")
    from hqq.core.quantize import Quantizer

    bits, group_size, axis = config.hqq_settings(name)
    check_hqq_shape(name, value.shape, bits, group_size, axis)
    packed, made = Quantizer.quantize(
        value, nbits=bits, group_size=group_size, axis=axis, device=str(value.device)
    )
    parts = [packed, made["scale"].to(dtype), made["zero"].to(dtype)]
    # clones, because HQQ's are made in inference mode and may not meet autograd
    parts = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return QuantizedWeight(parts, "hqq", value.shape, [bits, axis])


def check_hqq_shape(name: str, shape: torch.Size, bits: int, group_size: int, axis: int) -> None:
    """Groups must fill the matrix, and rows of groups the words that they are packed in.

    Raises:
        ConfigError: naming the weight.
    """
    numel, words = shape.numel(), HQQ_WORDS[bits] if bits != 3 else 1  # 3 bits are filled up
    if numel % group_size:
        raise ConfigError(
            f"quantization.group_size = {group_size} does not divide the {numel} weights of {name}"
        )
    rows = group_size if axis == 0 else numel // group_size
    if rows % words:
        raise ConfigError(
            f"quantization: {name} has {rows} rows of groups, which {bits} bits pack by {words}; "
            "use another group_size or axis for it, or skip_modules"
        )


FOUR_BIT = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)


def companions(name: str, files: Container[str]) -> dict[str, str]:
    """Return the tensors of a stored weight: name in bitsandbytes' terms -> name in the files.

    Empty for weights that are not quantized.
    """
    found = {key: f"{name}.{key}" for key in FOUR_BIT if f"{name}.{key}" in files}
    scales = f"{name.removesuffix('weight')}SCB"
    return found | ({"SCB": scales} if scales in files else {})
