"""Shapes of models that the training benchmark knows, and the operations that they need."""

from collections.abc import Sequence
from typing import Any

Shape = dict[str, Any]  # keys of a config.json

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
DELTA_NET = {  # of three layers in four, in Qwen3-Next and Qwen3.5
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000.0,
}
PRESETS: dict[str, Shape] = {
    "llama-1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "llama-8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-70b": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.02,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "router_aux_loss_coef": 0.9,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "gemma2-9b": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "layer_types": ["sliding_attention", "full_attention"] * 21,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
    },
    "gemma3-12b": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "layer_types": ([*["sliding_attention"] * 5, "full_attention"]) * 8,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
    },
    "deepseek-v3-16b": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "first_k_dense_replace": 1,
        "vocab_size": 163840,
        "max_position_embeddings": 8192,
        "rope_theta": 50000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen3.5-9b": {
        "model_type": "qwen3_5_text",
        "architectures": ["Qwen3_5ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        **DELTA_NET,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 8,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "qwen3-next-80b-a3b": {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        **DELTA_NET,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 12,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "tiny": LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


def shape_of(preset: str, layers: int | None = None) -> Shape:
    """Return a preset's config, of fewer layers if asked."""
    config = dict(PRESETS[preset])
    if layers:
        config["num_hidden_layers"] = layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    return config


def matmul_weights(shape: Shape) -> int:
    """Count the weights that a token is multiplied with.

    These are all but embedding and norms, and of experts those that it is sent to.
    """
    hidden = shape["hidden_size"]
    experts = expert_count(shape)
    usual = 0 if experts else int(shape["num_hidden_layers"])
    dense = int(shape.get("first_k_dense_replace", usual))
    inner = shape.get("moe_intermediate_size", shape["intermediate_size"])
    chosen = shape.get("num_experts_per_tok", 0) + shape.get("n_shared_experts", 0)
    layers = shape["num_hidden_layers"]
    mixture = 3 * hidden * inner * chosen + hidden * experts
    mlps = dense * 3 * hidden * shape["intermediate_size"] + (layers - dense) * mixture
    stateful = layer_types(shape).count("linear_attention")
    mixers = (layers - stateful) * attention_weights(shape) + stateful * delta_net_weights(shape)
    count: int = mixers + mlps + shape["vocab_size"] * hidden
    return count


def layer_types(shape: Shape) -> list[str]:
    """Return the type of each layer's attention."""
    return shape.get("layer_types") or ["full_attention"] * shape["num_hidden_layers"]


def delta_net_weights(shape: Shape) -> int:
    """Count the weights of a delta net's projections: of keys and queries, of values, gates and
    outputs, and two numbers for each head of values.
    """
    if "linear_num_value_heads" not in shape:
        return 0
    hidden, heads = shape["hidden_size"], shape["linear_num_value_heads"]
    keys = shape["linear_num_key_heads"] * shape["linear_key_head_dim"]
    values = heads * shape["linear_value_head_dim"]
    return int(hidden * (2 * keys + 3 * values + 2 * heads))


def expert_count(shape: Shape) -> int:
    """Return the experts of a layer, 0 without any."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    return int(next((shape[key] for key in keys if key in shape), 0))


def head_sizes(shape: Shape) -> tuple[int, int]:
    """Return the sizes of a query's and of a value's head."""
    if "kv_lora_rank" in shape:
        return shape["qk_nope_head_dim"] + shape["qk_rope_head_dim"], shape["v_head_dim"]
    size = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    return size, size


def attention_weights(shape: Shape) -> int:
    """Count the weights of a layer's projections."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    size, value_size = head_sizes(shape)
    if "kv_lora_rank" not in shape:
        gate = heads if "linear_num_value_heads" in shape else 0  # a gate for each query
        return int(hidden * size * (2 * (heads + shape["num_key_value_heads"]) + gate))
    rank = shape["kv_lora_rank"]
    keys = hidden * (rank + shape["qk_rope_head_dim"])
    values = rank * heads * (shape["qk_nope_head_dim"] + value_size)
    return int(hidden * heads * size + keys + values + heads * value_size * hidden)


def attended(lengths: Sequence[Sequence[int]], window: int | None = None) -> float:
    """Return how many tokens a token attends to on average, itself included.

    Args:
        lengths: of the documents of each row.
        window: the most that it attends to.
    """
    documents = [length for row in lengths for length in row]
    short = [length if window is None else min(length, window) for length in documents]
    seen = sum(
        near * (near + 1) / 2 + (length - near) * near
        for near, length in zip(short, documents, strict=True)
    )
    return seen / sum(documents)


def flops_per_token(shape: Shape, mode: str, lengths: Sequence[Sequence[int]]) -> float:
    """Algorithmic operations, recomputation not counted.

    A weight costs 2 forward, 2 for the gradient of its input, and 2 for its own if it is trained; a
    pair of tokens in attention twice the heads' sizes of query and value forward, and twice that
    backward.

    Args:
        lengths: of the documents of each row.
    """
    types = layer_types(shape)
    near, stateful = (types.count(kind) for kind in ("sliding_attention", "linear_attention"))
    pairs = (len(types) - near - stateful) * attended(lengths)
    pairs += near * attended(lengths, shape.get("sliding_window"))
    attention = 3 * 2 * shape["num_attention_heads"] * sum(head_sizes(shape)) * pairs
    states = 3 * 2 * stateful * delta_net_products(shape)
    return (6 if mode == "full" else 4) * matmul_weights(shape) + attention + states


def delta_net_products(shape: Shape) -> int:
    """Count the numbers that a token is multiplied with in the states of a delta net: what a key
    finds there, what is put there instead, and what a query reads.
    """
    if "linear_num_value_heads" not in shape:
        return 0
    state = shape["linear_key_head_dim"] * shape["linear_value_head_dim"]
    return int(3 * shape["linear_num_value_heads"] * state)
