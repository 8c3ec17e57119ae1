"""The formats of quantized checkpoints that are read, each a class of its own."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from headrace.schemas.json_text import read_json_object
from headrace.trainer.architecture.gguf_index import SUFFIX as GGUF_SUFFIX
from headrace.trainer.architecture.model_files import CONFIG_NAME, MAX_CONFIG_BYTES, StoredTensor
from headrace.trainer.stored.bnb import Bnb
from headrace.trainer.stored.compressed_tensors import CompressedTensors
from headrace.trainer.stored.fp8 import Fp8Blocks, Fp8Rows
from headrace.trainer.stored.gguf_blocks import gguf_weights
from headrace.trainer.stored.gptq import Awq, Gptq
from headrace.trainer.stored.modelopt import ModelOpt
from headrace.trainer.stored.mxfp4 import Mxfp4
from headrace.trainer.stored.settings import quantization_method, quantization_settings
from headrace.trainer.stored.stored_weight import StoredFormat, StoredWeight

MODELOPT_NAME = "hf_quant_config.json"  # of ModelOpt, whose older exports leave config.json alone
# `quant_method` in config.json -> its class; `settings.READ` has the same names
FORMATS: Mapping[str, type[StoredFormat]] = {
    "awq": Awq,
    "bitsandbytes": Bnb,
    "compressed-tensors": CompressedTensors,
    "fbgemm_fp8": Fp8Rows,
    "fp8": Fp8Blocks,
    "gptq": Gptq,
    "modelopt": ModelOpt,
    "mxfp4": Mxfp4,
    "mxfp8": Fp8Blocks,
}


def stored_format(directory: Path) -> StoredFormat | None:
    """Return the format of a model's weights; None where they are not quantized.

    Raises:
        ConfigError: one that is not read.
    """
    settings = quantization_settings(read_json_object(directory / CONFIG_NAME, MAX_CONFIG_BYTES))
    if settings is None and (directory / MODELOPT_NAME).is_file():
        found = read_json_object(directory / MODELOPT_NAME, MAX_CONFIG_BYTES)
        settings = {**(found.get("quantization") or {}), "quant_method": "modelopt"}
    if settings is None:
        return None
    return FORMATS[quantization_method(str(directory), settings)](settings, str(directory))


def stored_weights(
    directory: Path, tensors: Mapping[str, StoredTensor], model: nn.Module
) -> dict[str, StoredWeight]:
    """Return the weights that a model's files hold quantized, or under other names, by name.

    Args:
        model: without adapters, on the meta device.

    Raises:
        ConfigError: of a format that is not read.
    """
    if any(stored.path.suffix == GGUF_SUFFIX for stored in tensors.values()):
        return gguf_weights(str(directory), model, tensors)
    held = stored_format(directory)
    return {} if held is None else held.weights(tensors)
