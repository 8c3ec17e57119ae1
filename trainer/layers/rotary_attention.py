"""Attention that turns queries and keys by our kernel, in the place of transformers' modules.

What Llama, Mistral, Qwen 2 and Qwen 3 compute in transformers 5.14 to 5.23, over the same parts.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from headrace.kernels.on_accelerator import on_accelerator
from headrace.kernels.rotary import rotary
from headrace.trainer.architecture.half_layer import Absent
from headrace.trainer.layers.document_attention import VisibleTokens, attend

HEAD_NORMS = ("q_norm", "k_norm")  # Qwen 3's
SETTINGS = ("head_dim", "scaling", "num_key_value_groups", "is_causal")  # `attend` reads some


class RotaryAttention(nn.Module):
    """An attention's projections under their names; heads stay where the projections put them."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    head_dim: int
    scaling: float

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        for name, part in attention.named_children():
            self.add_module(name, part)
        for name in SETTINGS:
            setattr(self, name, getattr(attention, name))
        self.attend: Callable[..., tuple[Tensor, None]] = attend
        self.has_head_norms = hasattr(attention, HEAD_NORMS[0])

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | VisibleTokens | None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape)
        key = self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape)
        if self.has_head_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotary(query, key, *position_embeddings, triton=on_accelerator(query))
        mixed, _ = self.attend(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attention_mask,
            scaling=self.scaling,
        )
        output: Tensor = self.o_proj(mixed.flatten(2))
        return output, None


def swap_attention(layer: nn.Module, name: str) -> None:
    """Put a `RotaryAttention` in the place of a layer's attention; half a layer may have none.

    Args:
        name: of the attention in the layer, as the family's record has it.
    """
    attention = getattr(layer, name)
    if not isinstance(attention, Absent):
        setattr(layer, name, RotaryAttention(attention))
