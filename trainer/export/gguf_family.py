"""Facts about an architecture that llama.cpp needs, and its layout of the weights."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType

from headrace.schemas.errors import ConfigError
from headrace.trainer.architecture.config_limits import read_model_config as check_sizes
from headrace.trainer.architecture.config_limits import transformers_reads
from headrace.trainer.architecture.families import FAMILIES


@dataclass(frozen=True)
class GgufFamily:
    """Architecture name and weight layout of a family in llama.cpp.

    Attributes:
        rotates_pairs: as in `GgufKind`.
        norm_offset: added to the weights of norms.
    """

    arch: MODEL_ARCH
    rotates_pairs: bool
    norm_offset: float


def gguf_family(model: Path, model_type: str) -> GgufFamily:
    """Return the layout of a family's weights.

    Raises:
        ConfigError: the family cannot be exported.
    """
    family = FAMILIES.get(model_type)
    if family is None or family.gguf is None:
        known = ", ".join(name for name, other in FAMILIES.items() if other.gguf is not None)
        raise ConfigError(
            f'{model}: model_type "{model_type}" cannot be exported to GGUF; supported: {known}'
        )
    offset = 0.0 if family.rms_norm is None else family.rms_norm.offset
    return GgufFamily(MODEL_ARCH[family.gguf.arch], family.gguf.rotates_pairs, offset)


def read_model_config(model: Path) -> dict[str, Any]:
    """config.json, its defaults filled in by transformers."""
    from transformers import AutoConfig

    check_sizes(model)
    with transformers_reads(model / "config.json"):
        values: dict[str, Any] = AutoConfig.from_pretrained(
            model, local_files_only=True, trust_remote_code=False
        ).to_dict()
    if not values.get("head_dim") and values.get("num_attention_heads"):
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    return values


def add_hyperparameters(writer: GGUFWriter, config: dict[str, Any], family: GgufFamily) -> None:
    """Write the architecture's hyperparameters."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    if family.arch is MODEL_ARCH.GEMMA2:
        check_attention_scale(config)
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if family.arch in (MODEL_ARCH.GEMMA2, MODEL_ARCH.PHI3) and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    add_rope(writer, config["rope_parameters"])


def check_attention_scale(config: dict[str, Any]) -> None:
    """llama.cpp has no key for it: it takes the head size, or in the 27B shape the width of a head.

    Raises:
        ConfigError: the model has another scale.
    """
    is_27b = config["num_hidden_layers"] == 46
    width = config["hidden_size"] // config["num_attention_heads"]
    expected = width if is_27b else config["head_dim"]
    if config["query_pre_attn_scalar"] != expected:
        raise ConfigError(
            f"query_pre_attn_scalar = {config['query_pre_attn_scalar']} has no form in GGUF, "
            f"where it is always {expected}"
        )


def add_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    """Base and scaling of the rotary embedding.

    Raises:
        ConfigError: a scaling that GGUF has no form for.
    """
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope["rope_type"]:
        case "default" | "llama3":  # llama3: a factor for each frequency, see `rope_factors`
            return
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        case other:
            raise ConfigError(f'rope_type "{other}" cannot be exported to GGUF')


def rope_factors(config: dict[str, Any]) -> npt.NDArray[np.float32] | None:
    """Return the divisors of Llama 3's frequencies, [head size / 2]; None for other models.

    Wavelengths above the old context over `low_freq_factor` are stretched by `factor`, those below
    it over `high_freq_factor` are left, between them it is interpolated.
    """
    rope = config["rope_parameters"]
    if rope["rope_type"] != "llama3":
        return None
    exponents = np.arange(0, config["head_dim"], 2, dtype=np.float64) / config["head_dim"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float32] = (1 / ((1 - kept) / rope["factor"] + kept)).astype(np.float32)
    return factors
