"""A tiny random model of every family, and ways to run it in stages and by transformers alone."""

from dataclasses import dataclass

import torch
from built_stages import build_stage
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.stage.stage import MicroBatch

CPU = torch.device("cpu")
VOCABULARY = 97
LAYERS = 4
ROWS = [[7, 12, 5], [24]]  # documents of packed rows, all of 24 tokens; a row of one document
FILLING = [[9, 11, 4]]  # the last piece of this row is filling

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
KINDS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}
# family -> what makes it different, over COMMON
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 6},
    "mixtral": {**EXPERTS, "num_local_experts": 4, "sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen2_moe": {
        **EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {
        **EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "head_dim": 16,
        "norm_topk_prob": True,
    },
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 5, "layer_types": KINDS, "head_dim": 8},
    "phi3": {
        "sliding_window": 9,
        "original_max_position_embeddings": 10,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 2.5, 3.0, 3.5],
            "original_max_position_embeddings": 10,
        },
    },
    "gemma2": {
        "sliding_window": 5,
        "layer_types": KINDS,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "sliding_window": 5,
        "layer_types": KINDS,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": None,
    },
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "tie_word_embeddings": True,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0, "rotary_pct": 0.5},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": True},
    "phi": {"partial_rotary_factor": 0.5, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "starcoder2": {"sliding_window": 6, "residual_dropout": 0.0, "embedding_dropout": 0.0},
}

DISCOVERED = {  # types that have no record
    "gpt_oss": {
        **EXPERTS,
        "num_local_experts": 4,
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": KINDS,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
}


def tiny_config(family):
    """transformers' config of a tiny model."""
    return CONFIG_MAPPING[family](**COMMON | FAMILIES[family])


def save_tiny(family, directory, **changes):
    """A model directory with random weights; norms and biases are random as well."""
    settings = (FAMILIES | DISCOVERED).get(family, {})
    config = CONFIG_MAPPING[family](**COMMON | settings | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return directory


def config_of(model, stages=1, adapter=None, **settings):
    """A training config for a model directory."""
    return TrainConfig.model_validate(
        {
            "model": str(model),
            "output_dir": "unused",
            "pipeline_stages": stages,
            "adapter": {"kind": "none"} if adapter is None else adapter,
            "optimizer": {"lr": 1e-3},
            "datasets": [{"path": "unused"}],
            **settings,
        }
    )


@dataclass(frozen=True)
class Batch:
    """Packed rows of token ids."""

    ids: torch.Tensor  # [b, s]
    labels: torch.Tensor
    document_lengths: list[list[int]]
    row_lengths: list[int]

    @property
    def trained_tokens(self):
        return int((self.labels >= 0).sum())

    def documents(self):
        """Each document alone, [1, n], filling left out."""
        for row, lengths in enumerate(self.document_lengths):
            start = 0
            for length in lengths:
                if start < self.row_lengths[row]:
                    yield self.ids[row : row + 1, start : start + length]
                start += length


def make_batch():
    """Rows of several documents, of a single one, and one with filling."""
    lengths = ROWS + FILLING
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (len(lengths), 24), generator=generator)
    labels = ids.roll(-1, dims=1)
    for row, documents in enumerate(lengths):
        labels[row, torch.tensor(documents).cumsum(0) - 1] = -100
    real = [24, 24, 20]
    labels[2, 20:] = -100
    return Batch(ids, labels, lengths, real)


def build(config):
    """All stages of a model, in this process."""
    plan = plan_model(config)
    return [build_stage(config, stage, CPU, plan) for stage in range(config.pipeline_stages)]


def run_forward(built, batch, seed=0, inputs=None):
    """Through all stages; returns their outputs. Fills `inputs` with what each stage was given."""
    micro_batch = MicroBatch(
        document_lengths=batch.document_lengths,
        row_lengths=batch.row_lengths,
        labels=batch.labels,
        loss_scale=1 / batch.trained_tokens,
        router_scale=1.0,
        seed=seed,
    )
    return run_on(built, batch.ids, micro_batch, inputs)


def run_on(built, ids, micro_batch, inputs=None):
    """`run_forward` of any micro-batch."""
    hidden, outputs = ids, []
    for part in built:
        if inputs is not None:
            hidden = hidden.detach().requires_grad_() if outputs else hidden
            inputs.append(hidden)
        outputs.append(part.stage(hidden, micro_batch))
        hidden = outputs[-1].value
    return outputs


def run_micro_batch(built, ids, micro_batch):
    """Forward and backward of any micro-batch through all stages; returns their outputs."""
    inputs = []
    outputs = run_on(built, ids, micro_batch, inputs)
    go_back(outputs, inputs)
    return outputs


def go_back(outputs, inputs):
    """The backward pass of all stages, as the engine does it."""
    gradient = None
    for number in reversed(range(len(outputs))):
        roots, gradients = [outputs[number].value], [gradient]
        if outputs[number].router_loss is not None and number < len(outputs) - 1:
            roots, gradients = [*roots, outputs[number].router_loss], [*gradients, None]
        kept = [index for index, root in enumerate(roots) if root.requires_grad]
        torch.autograd.backward([roots[i] for i in kept], [gradients[i] for i in kept])
        gradient = inputs[number].grad


def run_stages(built, batch, seed=0):
    """Forward and backward through all stages as the engine does.

    Tied embeddings have their gradients summed, on the first stage.

    Returns:
        The loss, the losses of all tokens, and the routers' part of the loss.
    """
    inputs = []
    outputs = run_forward(built, batch, seed, inputs)
    go_back(outputs, inputs)
    if built[0].tied_copy is not None:
        head = built[0].tied_head if len(built) == 1 else built[-1].tied_copy
        built[0].tied_copy.grad += head.grad
    router = [0.0 if o.router_loss is None else o.router_loss.item() for o in outputs]
    loss = outputs[-1].value.item() + sum(router[:-1])
    return loss, outputs[-1].token_losses, sum(router)


def gradients_of(built):
    """Gradients by name in the whole model."""
    return {item.name: item.parameter.grad for part in built for item in part.trained if item.owned}


def reference_loss(model, batch, router_coefficient=0.0, module=None, top_k=2):
    """transformers' own loss over each document alone, and its routers' loss layer by layer."""
    total, logits_by_layer = 0.0, []
    for ids in batch.documents():
        settings = {"output_router_logits": True} if router_coefficient else {}
        output = model(input_ids=ids, use_cache=False, **settings)
        total = total + functional.cross_entropy(
            output.logits[0, :-1].float(), ids[0, 1:], reduction="sum"
        )
        if router_coefficient:
            logits_by_layer.append(output.router_logits)
    loss, router = total / batch.trained_tokens, 0.0
    if router_coefficient:
        layers = [torch.cat(parts) for parts in zip(*logits_by_layer, strict=True)]
        losses = [
            module.load_balancing_loss_func((layer,), layer.shape[-1], top_k) for layer in layers
        ]
        router = router_coefficient * sum(losses) / len(losses)
    return loss + router, router
