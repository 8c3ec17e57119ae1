"""Families with layers that carry a state from token to token, in place of attention or beside it.

A record says where such a layer keeps its mixer, the module with the state. All else about these
models is found as in any other. Read against transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# layer types of config.json: those with a state, and those that neither attend nor have one
STATE_TYPES = frozenset({"linear_attention", "conv", "hybrid"})
OTHER_TYPES = frozenset({"mlp", "moe"})


@dataclass(frozen=True)
class OneRow:
    """Description of a mixer that can take all documents of a micro-batch as one row, with zeros
    between them, which its convolution does not see through.
    """

    taps: str = "conv_kernel_size"  # attribute: how many tokens the convolution sees
    # transformers' function that carries the state, for which a kernel stands in; None: no state
    scan: str | None = None


@dataclass(frozen=True)
class StateLayers:
    """Description of the layers of a family that have a state."""

    mixer: str  # path of the module with the state, in its layer
    mask: str = "attention_mask"  # argument of the layer that reaches the mixer as its mask
    bypassed: tuple[str, ...] = ()  # linear layers of the mixer that it reads the weights of
    one_row: OneRow | None = None  # None: documents run by themselves
    float32: str | None = None  # key of config.json that keeps hidden states in float32
    absent_from: str | None = None  # key of a list by layer, true where a layer has none
    only_if: str | None = None  # key of config.json without which no layer has one
    cached: bool = True  # transformers' cache holds the states when text is generated

    @property
    def attends(self) -> bool:
        """Return whether these layers attend as well, and are given a mask for it."""
        return self.mask != "attention_mask"


RESIDUAL = "residual_in_fp32"
DELTA_NET = StateLayers("linear_attn", one_row=OneRow(scan="torch_chunk_gated_delta_rule"))
SHORT_CONVOLUTION = StateLayers("conv", one_row=OneRow())
KIMI_DELTA = StateLayers("self_attn", one_row=OneRow(scan="chunk_kimi_delta_attention"))
STATE_SPACE = OneRow(scan="mamba2_chunk_scan")
# model_type in config.json -> record
STATE_LAYERS: Mapping[str, StateLayers] = {
    "bailing_hybrid": KIMI_DELTA,
    "bamba": StateLayers("mamba", one_row=STATE_SPACE),
    "falcon_h1": StateLayers("mamba", mask="mamba_attention_mask", one_row=STATE_SPACE),
    "falcon_mamba": StateLayers("mixer", bypassed=("dt_proj",), float32=RESIDUAL),
    "granitemoehybrid": StateLayers("mamba", one_row=STATE_SPACE),
    "jamba": StateLayers("mamba", bypassed=("dt_proj",)),
    "kimi_linear": KIMI_DELTA,
    "lfm2": SHORT_CONVOLUTION,
    "lfm2_moe": SHORT_CONVOLUTION,
    "lfm3": SHORT_CONVOLUTION,
    # no state, but scores that grow with the position in the whole row
    "llama4_text": StateLayers(
        "self_attn", absent_from="no_rope_layers", only_if="attn_temperature_tuning", cached=False
    ),
    "mamba": StateLayers("mixer", bypassed=("dt_proj",), float32=RESIDUAL),
    "mamba2": StateLayers("mixer", float32=RESIDUAL, one_row=STATE_SPACE),
    "minimax": StateLayers("self_attn", cached=False),
    "nemotron_h": StateLayers("mixer", one_row=STATE_SPACE),
    "olmo_hybrid": DELTA_NET,
    "qwen3_5_moe_text": DELTA_NET,
    "qwen3_5_text": DELTA_NET,
    "qwen3_next": DELTA_NET,
    "recurrent_gemma": StateLayers("temporal_block", cached=False),
}

EMBEDDINGS = "its layers take the embeddings again, which do not pass between stages"
# model_type -> why layers with a state are not enough
UNSUPPORTED: Mapping[str, str] = {
    "zamba": EMBEDDINGS,
    "zamba2": EMBEDDINGS,
    "zaya": "its routers hand hidden states of their own from layer to layer",
}


def is_bypassed(name: str, model_type: str) -> bool:
    """Return whether a mixer reads the weight of a linear layer of this name in place of calling
    the layer: adapters on it would have no effect, and it cannot be quantized.
    """
    states = STATE_LAYERS.get(model_type)
    return states is not None and name.rsplit(".", 1)[-1] in states.bypassed


def has_state(layer_type: str) -> bool:
    """Return whether layers of a type have a state."""
    return layer_type in STATE_TYPES


def mixer_of(layer: "nn.Module", states: StateLayers) -> "nn.Module":
    """Return the module with the state of a layer that has one."""
    return layer.get_submodule(states.mixer)
