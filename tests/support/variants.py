"""Types of models with settings of published checkpoints that their defaults do not have."""

import torch
from peft import get_peft_model
from tiny_families import (
    build,
    config_of,
    gradients_of,
    make_batch,
    reference_loss,
    run_stages,
    save_tiny,
)
from transformers import AutoModelForCausalLM

from headrace.trainer.building.self_check import gradient_difference

NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
OPT = {**NO_DROPOUT, "ffn_dim": 40, "word_embed_proj_dim": 32}
FALCON = {"bias": True, "alibi": True}
LLAMA4 = {
    "head_dim": 8,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 5,
    "no_rope_layers": [1, 0, 1, 0],
    "floor_scale": 4,
    "attn_scale": 0.5,
}
GEMMA = {
    "head_dim": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "final_logit_softcapping": 3.0,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
}
INDEX = {
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 24,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "mlp_layer_types": None,
    "n_shared_experts": 1,
}
# variant -> model type, and settings over those of `tiny_families.COMMON`
VARIANTS = {
    "gpt2": ("gpt2", {"n_inner": 40}),
    "cerebras-gpt": (
        "gpt2",
        {"activation_function": "gelu", "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "reorder_and_upcast_attn": True}),
    "starcoder": ("gpt_bigcode", {"multi_query": True, "n_inner": 40}),
    "bigcode-heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt-neo": (
        "gpt_neo",
        {
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 5,
            "intermediate_size": None,
        },
    ),
    "opt-125m": ("opt", {**OPT, "ffn_dim": 40}),
    "opt-350m": ("opt", {**OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "galactica": ("opt", {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    "bloom": ("bloom", {}),
    "bloom-6-heads": ("bloom", {"hidden_size": 48, "n_head": 6}),
    "bloom-after-norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "mpt": ("mpt", {}),
    "mpt-clipped": ("mpt", {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3}}),
    "mpt-6-heads": ("mpt", {"d_model": 48, "n_heads": 6, "hidden_size": 48}),
    "xglm": ("xglm", {**NO_DROPOUT, "attention_heads": 4, "num_layers": 4, "ffn_dim": 40}),
    "xglm-unscaled": (
        "xglm",
        {**NO_DROPOUT, "attention_heads": 4, "num_layers": 4, "scale_embedding": False},
    ),
    "falcon-rw": (
        "falcon",
        {
            **FALCON,
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "num_kv_heads": 4,
        },
    ),
    "falcon-alibi": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-6-heads": ("falcon", {**FALCON, "hidden_size": 48, "num_attention_heads": 6}),
    "nanochat": ("nanochat", {"final_logit_softcapping": 3.0}),
    "nanochat-uncapped": ("nanochat", {"final_logit_softcapping": None}),
    "biogpt": ("biogpt", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "openai-gpt": ("openai-gpt", {}),
    "llama4-scout": ("llama4_text", {**LLAMA4, "interleave_moe_layer_step": 1}),
    "llama4-maverick": ("llama4_text", {**LLAMA4, "use_qk_norm": False}),
    "llama4-dense": ("llama4_text", {**LLAMA4, "moe_layers": [], "attn_temperature_tuning": False}),
    "granite-swa": (
        "granite_swa",
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "layer_rope_theta": [10000.0, 0, 50000.0, 10000.0],
            "sliding_window": 5,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
        },
    ),
    "gemma-3n": (
        "gemma3n_text",
        {
            **GEMMA,
            "vocab_size_per_layer_input": 80,
            "altup_num_inputs": 3,
            "laurel_rank": 4,
            "intermediate_size": [40] * 4,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        },
    ),
    "gemma-3n-unshared": (
        "gemma3n_text",
        {
            **GEMMA,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "intermediate_size": [40] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma-4-e2b": (
        "gemma4_text",
        {
            **GEMMA,
            "vocab_size_per_layer_input": 97,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "use_double_wide_mlp": True,
        },
    ),
    "longcat-flash": (
        "longcat_flash",
        {
            **LATENT,
            "num_hidden_layers": 8,
            "num_layers": 4,
            "ffn_hidden_size": 40,
            "expert_ffn_hidden_size": 16,
            "moe_topk": 2,
            "zero_expert_num": 2,
        },
    ),
    "hunyuan-a13b": (
        "hunyuan_v1_moe",
        {"num_experts": 4, "moe_topk": [2] * 4, "head_dim": 8, "attention_bias": True},
    ),
    "minicpm3": (
        "minicpm3",
        {
            **{key: LATENT[key] for key in ("q_lora_rank", "kv_lora_rank", "num_key_value_heads")},
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 2.5, 3.0, 3.5],
                "original_max_position_embeddings": 10,
            },
        },
    ),
    "deepseek-v3.2": ("deepseek_v32", {**LATENT, **INDEX}),
    "glm-5": ("glm_moe_dsa", {**LATENT, **INDEX}),
    "glm-5-shared": (
        "glm_moe_dsa",
        {**LATENT, **INDEX, "indexer_types": ["full", "shared", "shared", "full"]},
    ),
}


ADAPTER = {"rank": 4, "target_modules": "all-linear"}


def variant(name, directory):
    """A model directory of a variant."""
    model_type, settings = VARIANTS[name]
    return save_tiny(model_type, directory, **settings)


def differences(directory, stages, kind):
    """Largest relative differences of loss and gradients from transformers, and PEFT.

    Args:
        kind: "full" or "lora".
    """
    batch = make_batch()
    adapter = ADAPTER if kind == "lora" else None
    built = build(config_of(directory, stages, adapter, router_loss=0.0))
    for part in built:
        part.stage.eval()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=built[0].architecture.attention
    )
    if adapter is not None:
        model = get_peft_model(model, built[0].method.peft)
        put_adapters(built, model)
    expected, _ = reference_loss(model.eval(), batch)
    expected.backward()
    loss, _, _ = run_stages(built, batch)
    ours = {name: value for name, value in gradients_of(built).items() if value is not None}
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return abs(loss - expected.item()) / abs(expected.item()), gradient_difference(ours, theirs)


@torch.no_grad()
def put_adapters(built, model):
    """Give both sides the same adapters, none of them zero."""
    generator = torch.Generator().manual_seed(2)
    parameters = dict(model.named_parameters())
    for part in built:
        for item in part.trained:
            item.parameter.add_(0.05 * torch.randn(item.parameter.shape, generator=generator))
            parameters[item.name].copy_(item.parameter)
