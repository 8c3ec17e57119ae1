"""A config of every causal language model type of transformers, and what becomes of the type."""

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from headrace.schemas.errors import ConfigError
from headrace.trainer.architecture.read_architecture import architecture_of
from headrace.trainer.building.self_check import FAILURES, check_against_transformers
from headrace.trainer.building.tiny_config import shrink

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 6.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
}
HEADS = {"head_dim": 128}
EXPERTS = {"num_experts_per_tok": 2}
# settings of published checkpoints where transformers' defaults make no model, or an easier one
PUBLISHED = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 500000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "deepseek_v2": EXPERTS,
    "dots1": {**EXPERTS, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma4_text": {
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": 30.0,
    },
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": HEADS,
    "lfm2_moe": {
        "num_hidden_layers": 24,
        "layer_types": ["conv", "conv", "full_attention", "conv"] * 6,
    },
    "ministral": HEADS,
    "nemotron": HEADS,
    "granite": MULTIPLIERS,
    "granitemoe": MULTIPLIERS,
    "granitemoeshared": MULTIPLIERS,
    "granitemoehybrid": {
        **MULTIPLIERS,
        "num_hidden_layers": 32,
        "layer_types": ["attention"] * 32,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope",
    },
}


def architecture_for(model_type, *, tiny=False):
    """Return how a model of a type is run, at the sizes of transformers' defaults or tiny ones.

    Raises:
        ConfigError: it is not, with the reason.
    """
    try:
        config = CONFIG_MAPPING[model_type](**PUBLISHED.get(model_type, {})).get_text_config()
        config = shrink(config) if tiny else config
    except FAILURES as error:
        reason = f"transformers' default config makes no model ({type(error).__name__})"
        raise ConfigError(reason) from None
    return architecture_of(config, model_type)


def outcome(model_type):
    """Return the largest difference from transformers, or the reason why a type is refused."""
    try:
        return check_against_transformers(architecture_for(model_type), model_type)
    except ConfigError as error:
        return str(error).split("is not supported: ")[-1].split("; supported")[0]
