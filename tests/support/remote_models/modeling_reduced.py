"""A small model in the manner of InternLM2 and Baichuan: one matrix for queries, keys and values,
rotary positions inside of attention, an additive mask that the model makes itself, outputs as
tuples.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_reduced import ReducedConfig


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def rotate(x, positions):
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = positions[:, None, :, None] * frequencies
    left, right = x[..., :half], x[..., half:]
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, attention_mask, position_ids):
        b, s, width = x.shape
        parts = self.W_pack(x).chunk(3, dim=-1)
        q, k, v = (part.view(b, s, self.heads, -1).transpose(1, 2) for part in parts)
        q, k = rotate(q, position_ids), rotate(k, position_ids)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + attention_mask
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, width))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = Mlp(config)
        self.attention_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None):
        x = hidden_states
        x = x + self.attention(self.attention_norm(x), attention_mask, position_ids)
        return (x + self.feed_forward(self.ffn_norm(x)),)


class ReducedPreTrainedModel(PreTrainedModel):
    config_class = ReducedConfig
    base_model_prefix = "model"


class ReducedModel(ReducedPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.tok_embeddings

    def forward(self, input_ids, **others):
        x = self.tok_embeddings(input_ids)
        s = input_ids.shape[1]
        least = torch.finfo(x.dtype).min
        mask = torch.full((s, s), least, device=x.device).triu(1)[None, None]
        positions = torch.arange(s, device=x.device).unsqueeze(0)
        for layer in self.layers:
            (x,) = layer(x, mask, positions)
        return self.norm(x)


class ReducedForCausalLM(ReducedPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = ReducedModel(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def get_output_embeddings(self):
        return self.output

    def forward(self, input_ids=None, use_cache=None, **others):
        return CausalLMOutputWithPast(logits=self.output(self.model(input_ids)))
