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
