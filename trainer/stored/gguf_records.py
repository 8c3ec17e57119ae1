"""Types of models in llama.cpp, and what it must be told of one: one record for each.

Read against gguf 0.19 and llama.cpp of 2026. Values that its graph has for granted are in `fixed`:
a model with another one is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_ARCH, ExpertGatingFuncType, GGUFWriter
from torch import Tensor

from headrace.schemas.errors import ConfigError

Settings = dict[str, Any]
Write = Callable[[GGUFWriter, Settings], None]
Fixed = tuple[str, Any]  # key of config.json, and the value that it must have where it is there
SLIDING, FULL = "sliding_attention", "full_attention"
Piece = tuple[str, Callable[[Tensor], Tensor]]  # GGUF's name behind the layer's, and its values


def norm_of_root(writer: GGUFWriter, config: Settings) -> None:
    """Write the epsilon of RMSNorm."""
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def norm_of_olmo(writer: GGUFWriter, config: Settings) -> None:
    """Write the epsilon of a RMSNorm whose config names it after all norms."""
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or config["layer_norm_eps"])


def norm_of_layer(writer: GGUFWriter, config: Settings) -> None:
    """Write the epsilon of LayerNorm, under whichever name the config has."""
    names = ("layer_norm_eps", "norm_epsilon", "norm_eps")
    writer.add_layer_norm_eps(next(config[name] for name in names if config.get(name)))


def window(writer: GGUFWriter, config: Settings) -> None:
    """Write the attention window, where there is one."""
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])


def caps(writer: GGUFWriter, config: Settings) -> None:
    """Write Gemma 2's soft-caps."""
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def granite_scales(writer: GGUFWriter, config: Settings) -> None:
    """Write Granite's four multipliers."""
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def logit_scale(writer: GGUFWriter, config: Settings) -> None:
    """Write Cohere's multiplier of the logits."""
    writer.add_logit_scale(config["logit_scale"])


def experts(writer: GGUFWriter, config: Settings) -> None:
    """Write the number of experts, of those that a token uses, and their width."""
    counts = ("num_local_experts", "num_experts", "n_routed_experts")
    writer.add_expert_count(next(config[name] for name in counts if config.get(name)))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def shared_experts(writer: GGUFWriter, config: Settings) -> None:
    """Write the width of the experts that all tokens pass."""
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def routed_by_sigmoid(writer: GGUFWriter, config: Settings) -> None:
    """Write how the routers of GLM weigh experts, and which layers have some."""
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])


def width_of_experts(writer: GGUFWriter, config: Settings) -> None:
    """Write the width of experts that the config names as that of MLPs."""
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def short_convolutions(writer: GGUFWriter, config: Settings) -> None:
    """Write the tokens that LFM2's convolutions see."""
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_shortconv_l_cache(config["conv_L_cache"])


def of_lfm2(config: Settings) -> Settings:
    """Return settings with the width that LFM2's MLPs have, and no keys where there is none."""
    width = config["intermediate_size"]
    if config["block_auto_adjust_ff_dim"]:
        unit = config["block_multiple_of"]
        width = int(config["block_ffn_dim_multiplier"] * int(2 * width / 3))
        width = unit * -(-width // unit)
    keys = config["num_key_value_heads"]
    heads = [keys if kind == FULL else 0 for kind in config["layer_types"]]
    return {**config, "intermediate_size": width, "num_key_value_heads": heads}


def whole(values: Tensor) -> Tensor:
    """Return a weight's values as they are."""
    return values


def unchanged(config: Settings) -> Settings:
    """Return settings as they are."""
    return config


def sparse_everywhere(_: GGUFWriter, config: Settings) -> None:
    """Refuse mixtures of which some layers are dense."""
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ConfigError("layers without experts among others have no form in GGUF")


def a_key_for_each_head(_: GGUFWriter, config: Settings) -> None:
    """Refuse heads that share their keys, whose norms llama.cpp has for as wide as the model."""
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        raise ConfigError("num_key_value_heads below num_attention_heads has no form in GGUF here")


def gemma_scale(_: GGUFWriter, config: Settings) -> None:
    """Check the scale of attention, for which llama.cpp has no key: it is the head's size, or in
    the 27B shapes the width of a head.

    Raises:
        ConfigError: the model has another scale.
    """
    layers = {"gemma2": 46, "gemma3_text": 62}[config["model_type"]]
    width = config["hidden_size"] // config["num_attention_heads"]
    expected = width if config["num_hidden_layers"] == layers else config["head_dim"]
    if config["query_pre_attn_scalar"] != expected:
        raise ConfigError(
            f"query_pre_attn_scalar = {config['query_pre_attn_scalar']} has no form in GGUF, "
            f"where it is always {expected}"
        )


def every(period: int, key: str, usual: Any, other: Any) -> Write:
    """Return a check that the last of every so many layers differs from those before it.

    Args:
        key: list by layer.
    """

    def check(_: GGUFWriter, config: Settings) -> None:
        count = config["num_hidden_layers"]
        wanted = [usual if (layer + 1) % period else other for layer in range(count)]
        if list(config.get(key) or wanted) != wanted:
            raise ConfigError(
                f"{key} is fixed in llama.cpp: each {period}th layer is {other!r}, the others "
                f"{usual!r}; this model has another order"
            )

    return check


@dataclass(frozen=True)
class GgufRecord:
    """A type of model in llama.cpp.

    Attributes:
        rotates_pairs: it turns neighboring channels, transformers turns the two halves of a head,
            so rows of query and key weights change places.
        norm_offset: added to the weights of norms.
        writes: what is written or checked beside what all types share.
        fixed: settings that its graph has for granted.
        pieces: weights that gguf has no names for, by their names within a layer: what becomes of
            them.
        settings: config.json as llama.cpp reads it.
    """

    arch: MODEL_ARCH
    writes: tuple[Write, ...] = (norm_of_root,)
    rotates_pairs: bool = False
    norm_offset: float = 0.0
    fixed: tuple[Fixed, ...] = ()
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    settings: Callable[[Settings], Settings] = unchanged


SILU: Fixed = ("hidden_act", "silu")
GEMMA_ACT: Fixed = ("hidden_activation", "gelu_pytorch_tanh")
LLAMA = GgufRecord(MODEL_ARCH.LLAMA, rotates_pairs=True, fixed=(SILU,))
GGUF_RECORDS: Mapping[str, GgufRecord] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": GgufRecord(
        MODEL_ARCH.LLAMA, (norm_of_root, experts), rotates_pairs=True, fixed=(SILU,)
    ),
    "arcee": GgufRecord(MODEL_ARCH.ARCEE, rotates_pairs=True, fixed=(("hidden_act", "relu2"),)),
    "qwen2": GgufRecord(MODEL_ARCH.QWEN2, fixed=(SILU,)),
    "qwen2_moe": GgufRecord(
        MODEL_ARCH.QWEN2MOE,
        (norm_of_root, experts, shared_experts, sparse_everywhere),
        fixed=(SILU, ("norm_topk_prob", False)),
    ),
    "qwen3": GgufRecord(MODEL_ARCH.QWEN3, fixed=(SILU,)),
    "qwen3_moe": GgufRecord(
        MODEL_ARCH.QWEN3MOE,
        (norm_of_root, experts, sparse_everywhere),
        fixed=(SILU, ("norm_topk_prob", True)),
    ),
    "seed_oss": GgufRecord(MODEL_ARCH.SEED_OSS, fixed=(SILU,)),
    "gemma": GgufRecord(MODEL_ARCH.GEMMA, norm_offset=1.0),
    "gemma2": GgufRecord(
        MODEL_ARCH.GEMMA2,
        (
            norm_of_root,
            window,
            caps,
            gemma_scale,
            every(2, "layer_types", "sliding_attention", "full_attention"),
        ),
        norm_offset=1.0,
        fixed=(GEMMA_ACT,),
    ),
    "gemma3_text": GgufRecord(
        MODEL_ARCH.GEMMA3,
        (
            norm_of_root,
            window,
            gemma_scale,
            every(6, "layer_types", "sliding_attention", "full_attention"),
        ),
        norm_offset=1.0,
        fixed=(GEMMA_ACT, ("final_logit_softcapping", None), ("attn_logit_softcapping", None)),
    ),
    "phi": GgufRecord(MODEL_ARCH.PHI2, (norm_of_layer,), fixed=(("qk_layernorm", False),)),
    "phi3": GgufRecord(MODEL_ARCH.PHI3, (norm_of_root, window), fixed=(SILU,)),
    "olmo2": GgufRecord(MODEL_ARCH.OLMO2, (norm_of_olmo,), fixed=(SILU,)),
    "olmoe": GgufRecord(
        MODEL_ARCH.OLMOE,
        (norm_of_olmo, experts, a_key_for_each_head),
        fixed=(SILU, ("norm_topk_prob", False), ("clip_qkv", None)),
    ),
    "starcoder2": GgufRecord(
        MODEL_ARCH.STARCODER2, (norm_of_layer,), fixed=(("hidden_act", "gelu_pytorch_tanh"),)
    ),
    "granite": GgufRecord(
        MODEL_ARCH.GRANITE, (norm_of_root, granite_scales), rotates_pairs=True, fixed=(SILU,)
    ),
    "granitemoe": GgufRecord(
        MODEL_ARCH.GRANITE_MOE,
        (norm_of_root, granite_scales, experts),
        rotates_pairs=True,
        fixed=(SILU,),
        pieces={
            "block_sparse_moe.input_linear.weight": (
                ("ffn_gate_exps.weight", lambda value: value.chunk(2, dim=1)[0]),
                ("ffn_up_exps.weight", lambda value: value.chunk(2, dim=1)[1]),
            )
        },
    ),
    "cohere": GgufRecord(MODEL_ARCH.COMMAND_R, (norm_of_layer, logit_scale), fixed=(SILU,)),
    "cohere2": GgufRecord(
        MODEL_ARCH.COHERE2,
        (
            norm_of_layer,
            logit_scale,
            window,
            every(4, "layer_types", "sliding_attention", "full_attention"),
        ),
        fixed=(SILU,),
    ),
    "smollm3": GgufRecord(
        MODEL_ARCH.SMOLLM3,
        (norm_of_root, every(4, "no_rope_layers", 1, 0)),
        rotates_pairs=True,
        fixed=(SILU, ("use_sliding_window", False)),
    ),
    "stablelm": GgufRecord(
        MODEL_ARCH.STABLELM, (norm_of_layer,), fixed=(SILU, ("qk_layernorm", False))
    ),
    "nemotron": GgufRecord(
        MODEL_ARCH.NEMOTRON, (norm_of_layer,), norm_offset=1.0, fixed=(("hidden_act", "relu2"),)
    ),
    "ernie4_5": GgufRecord(MODEL_ARCH.ERNIE4_5, fixed=(SILU,)),
    "glm4": GgufRecord(MODEL_ARCH.GLM4, fixed=(SILU,)),
    "glm4_moe": GgufRecord(
        MODEL_ARCH.GLM4_MOE,
        (norm_of_root, experts, routed_by_sigmoid),
        fixed=(SILU, ("n_group", 1), ("topk_group", 1)),
        pieces={"mlp.gate.e_score_correction_bias": (("exp_probs_b.bias", whole),)},
    ),
    "gpt_oss": GgufRecord(
        MODEL_ARCH.GPT_OSS,
        (norm_of_root, experts, width_of_experts, window, every(2, "layer_types", SLIDING, FULL)),
        fixed=(SILU, ("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)),
        pieces={
            "mlp.experts.gate_up_proj": (
                ("ffn_gate_exps.weight", lambda value: value[..., ::2].mT),
                ("ffn_up_exps.weight", lambda value: value[..., 1::2].mT),
            ),
            "mlp.experts.gate_up_proj_bias": (
                ("ffn_gate_exps.bias", lambda value: value[..., ::2]),
                ("ffn_up_exps.bias", lambda value: value[..., 1::2]),
            ),
            "mlp.experts.down_proj": (("ffn_down_exps.weight", lambda value: value.mT),),
            "mlp.experts.down_proj_bias": (("ffn_down_exps.bias", whole),),
            "self_attn.sinks": (("attn_sinks.weight", whole),),
        },
    ),
    "lfm2": GgufRecord(
        MODEL_ARCH.LFM2,
        (short_convolutions,),
        fixed=(("conv_bias", False),),
        pieces={
            "conv.conv.weight": (("shortconv.conv.weight", lambda value: value.squeeze(1)),),
        },
        settings=of_lfm2,
    ),
    "hunyuan_v1_dense": GgufRecord(MODEL_ARCH.HUNYUAN_DENSE, fixed=(SILU,)),
}


def gguf_record(model: str, config: Settings) -> GgufRecord:
    """Return the record of a model's type.

    Raises:
        ConfigError: the type, or a setting of this model, has no form in GGUF.
    """
    model_type = config["model_type"]
    record = GGUF_RECORDS.get(model_type)
    if record is None:
        raise ConfigError(
            f'{model}: model_type "{model_type}" cannot be exported to GGUF; supported: '
            f"{', '.join(GGUF_RECORDS)}"
        )
    for key, value in record.fixed:
        if key in config and config[key] != value:
            raise ConfigError(
                f"{model}: {key} = {config[key]!r:.60} has no form in GGUF for model_type "
                f'"{model_type}", where it is always {value!r}'
            )
    return record
