"""Quantization that a model's config.json tells of, and whether its format is read. No torch."""

from collections.abc import Mapping
from typing import Any

from headrace.schemas.errors import ConfigError
from headrace.schemas.outside_text import json_type

KEYS = ("quantization_config", "compression_config")  # the second of older compressed-tensors
# `quant_method` of formats that are read -> what they are; `formats.FORMATS` has their classes
READ: Mapping[str, str] = {
    "awq": "4 bits of AWQ",
    "bitsandbytes": "NF4, FP4 and INT8 of bitsandbytes",
    "compressed-tensors": "FP8, INT8, packed integers, NVFP4 and MXFP4 of compressed-tensors",
    "fbgemm_fp8": "FP8 with a scale for each row",
    "fp8": "FP8 in blocks of DeepSeek-V3, Qwen3-FP8 and others",
    "gptq": "2, 3, 4 and 8 bits of GPTQ",
    "modelopt": "NVFP4 and FP8 of NVIDIA's ModelOpt",
    "mxfp4": "MXFP4 of gpt_oss",
    "mxfp8": "FP8 with a power of two for 32 weights",
}
REMEDY = "use the model that it was made of"


def quantization_settings(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what config.json says of quantized weights; None where they are not quantized.

    Args:
        values: of config.json, whose language model may have a config of its own.
    """
    text = values.get("text_config")
    for part in (values, text if isinstance(text, Mapping) else {}):
        for key in KEYS:
            if part.get(key):
                found: Mapping[str, Any] = part[key]
                return found
    return None


def quantization_method(path: str, settings: Mapping[str, Any]) -> str:
    """Return the name of a format that is read.

    Args:
        path: of the model, for messages.

    Raises:
        ConfigError: it is not read, with those that are.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{path}: quantization_config is {json_type(settings)}, not an object")
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in READ:
        raise ConfigError(
            f"{path}: its weights are quantized already, by {method}, which is not read; {REMEDY} "
            f"(read are {', '.join(READ)})"
        )
    return str(method)


def check_readable(path: str, values: Mapping[str, Any]) -> None:
    """Check by config.json alone that a model's weights are of a format that is read.

    Raises:
        ConfigError: as `quantization_method`.
    """
    settings = quantization_settings(values)
    if settings is not None:
        quantization_method(path, settings)
