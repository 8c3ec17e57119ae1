"""Facts about an architecture that llama.cpp needs, and its layout of the weights."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter, RopeScalingType

from headrace.schemas.errors import ConfigError
from headrace.trainer.architecture.config_limits import read_model_config as check_sizes
from headrace.trainer.architecture.config_limits import transformers_reads
from headrace.trainer.stored.gguf_records import SLIDING, GgufRecord, window

logger = logging.getLogger(__name__)


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


def add_hyperparameters(writer: GGUFWriter, config: dict[str, Any], record: GgufRecord) -> None:
    """Write the architecture's hyperparameters."""
    writer.add_context_length(context_length(config, record))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    rope = global_rope(config)
    turned = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    writer.add_rope_dimension_count(int(config["head_dim"] * turned))
    for write in record.writes:
        write(writer, config)
    add_rope(writer, rope)


def context_length(config: dict[str, Any], record: GgufRecord) -> int:
    """Return the tokens up to which llama.cpp computes the same: where its graph of a type has no
    attention window, those of the model's window.
    """
    positions: int = config["max_position_embeddings"]
    reach: int | None = config.get("sliding_window")
    kinds = config.get("layer_types") or [SLIDING]
    used = config.get("use_sliding_window") is not False and SLIDING in kinds
    if reach is None or not used or window in record.writes or reach >= positions:
        return positions
    logger.warning(
        "attention reaches %d tokens back, which llama.cpp does not do for this type of model: the "
        "file's context is as long",
        reach,
    )
    return reach


def global_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary settings of layers that see everything, where they differ by kind."""
    rope: dict[str, Any] = config["rope_parameters"]
    return rope.get("full_attention", rope)


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
            if rope.get("truncate") is False:
                logger.warning(
                    "llama.cpp rounds the bounds of YaRN's frequencies, which this model does not: "
                    "its log-probabilities will differ by thousandths"
                )
        case other:
            raise ConfigError(f'rope_type "{other}" cannot be exported to GGUF')


def rope_factors(config: dict[str, Any]) -> npt.NDArray[np.float32] | None:
    """Return the divisors of Llama 3's frequencies, [head size / 2]; None for other models.

    Wavelengths above the old context over `low_freq_factor` are stretched by `factor`, those below
    it over `high_freq_factor` are left, between them it is interpolated.
    """
    rope = global_rope(config)
    if rope["rope_type"] != "llama3":
        return None
    exponents = np.arange(0, config["head_dim"], 2, dtype=np.float64) / config["head_dim"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float32] = (1 / ((1 - kept) / rope["factor"] + kept)).astype(np.float32)
    return factors
