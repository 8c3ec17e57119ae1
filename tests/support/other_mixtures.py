"""Tiny mixtures whose dense layers, shared experts or routers are named like others' experts."""

import torch
from tiny_families import COMMON, EXPERTS
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

OTHERS = {
    "phimoe": {**EXPERTS, "num_local_experts": 4},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
    },
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,
    },
}


def save_other(family, directory):
    """A model directory with random weights."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**COMMON | OTHERS[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory
