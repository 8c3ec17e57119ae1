"""The model families that the pipeline knows, each a small record over transformers' own modules.

A record says where a model keeps its parts and what its forward pass does between them. All else is
read from the model: attention windows and layer types from its config, arguments from signatures.
Read against transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.schemas.errors import ConfigError
from headrace.trainer.architecture.families_state import StateLayers
from headrace.trainer.families.ends import NO_ENDS, Ends


@dataclass(frozen=True)
class NormKind:
    """Computation of a family's RMSNorm: the settings of `kernels.rms_norm`."""

    offset: float = 0.0  # added to its weights
    rounds_first: bool = True


# names that transformers gives to them, in any family
RESIDUAL = (
    *("o_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "c_proj"),
    *("out_proj", "fc_out", "w2"),
)


@dataclass(frozen=True)
class Family:
    """A decoder-only causal model. Paths are relative to it; the other fields name config keys."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str | None = "model.norm"
    rotary: str | None = "model.rotary_emb"
    head: str = "lm_head"
    embedding_multiplier: str | None = None  # hidden = embedding * value
    embedding_root: str | None = None  # hidden = embedding * root of the value, in bfloat16
    embedding_dropout: str | None = None  # probability
    logit_multiplier: str | None = None  # logits = head(hidden) * value
    logit_divisor: str | None = None  # logits = head(hidden) / value
    logit_softcap: str | None = None  # logits = value * tanh(logits / value)
    attention: tuple[str, ...] = ()  # modules of a layer before its MLP; none if side by side
    attention_module: str = "self_attn"  # the one that attends, where the former are given
    rms_norm: NormKind | None = None  # of all its norms; None: they are of another kind
    compiles: bool = True  # layers may run compiled
    llama_attention: bool = False  # `layers.rotary_attention` computes the same
    outputs: tuple[str, ...] = ("mlp.down_proj",)  # linear layers that add to the hidden states
    residual: tuple[str, ...] = RESIDUAL  # all layers or weights that do, by their last names
    side_by_side: str | None = None  # without this key of the config, only the last of `outputs`
    states: StateLayers | None = None  # where layers have a state; None: none has
    ends: Ends = NO_ENDS  # between embedding and first layer, and last norm and head
    refused: tuple[str, ...] = ()  # config keys that must not be set

    def parts(self, layers: int) -> list[str]:
        """List the paths of all parts that have weights, in order of use, each once."""
        found = [self.embedding, *self.ends.first]
        found += [f"{self.layers}.{index}" for index in range(layers)]
        found += [path for path in (self.norm, *self.ends.last, self.head) if path]
        return list(dict.fromkeys(found))


LLAMA_NORM = NormKind()
OLMO_NORM = NormKind(rounds_first=False)
GEMMA_NORM = NormKind(offset=1.0, rounds_first=False)
LLAMA_OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")  # where attention and MLP are side by side
NORM_FIRST = ("input_layernorm", "self_attn")
NORM_LAST = ("self_attn", "post_attention_layernorm")
NORM_TWICE = ("input_layernorm", "self_attn", "post_attention_layernorm")


# model_type in config.json -> record
FAMILIES: Mapping[str, Family] = {
    "cohere": Family(logit_multiplier="logit_scale", outputs=LLAMA_OUTPUTS),
    "cohere2": Family(logit_multiplier="logit_scale", outputs=LLAMA_OUTPUTS),
    "falcon": Family(
        embedding="transformer.word_embeddings",
        layers="transformer.h",
        norm="transformer.ln_f",
        rotary="transformer.rotary_emb",
        outputs=("self_attention.dense", "mlp.dense_4h_to_h"),
        side_by_side="parallel_attn",
    ),
    "gemma2": Family(
        logit_softcap="final_logit_softcapping",
        attention=NORM_TWICE,
        rms_norm=GEMMA_NORM,
    ),
    "gemma3_text": Family(
        logit_softcap="final_logit_softcapping",
        attention=NORM_TWICE,
        rms_norm=GEMMA_NORM,
        refused=("use_bidirectional_attention",),
    ),
    "gpt_neox": Family(
        embedding="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        rotary="gpt_neox.rotary_emb",
        embedding_dropout="hidden_dropout",
        outputs=("attention.dense", "mlp.dense_4h_to_h"),
        side_by_side="use_parallel_residual",
    ),
    "granite": Family(
        embedding_multiplier="embedding_multiplier",
        logit_divisor="logits_scaling",
        attention=NORM_FIRST,
        rms_norm=LLAMA_NORM,
    ),
    "llama": Family(
        attention=NORM_FIRST,
        rms_norm=LLAMA_NORM,
        llama_attention=True,
    ),
    "mistral": Family(
        attention=NORM_FIRST,
        rms_norm=LLAMA_NORM,
        llama_attention=True,
    ),
    "mixtral": Family(attention=NORM_FIRST, rms_norm=LLAMA_NORM),
    "olmo2": Family(attention=NORM_LAST, rms_norm=OLMO_NORM),
    "phi": Family(
        norm="model.final_layernorm",
        embedding_dropout="embd_pdrop",
        outputs=("self_attn.dense", "mlp.fc2"),
    ),
    "phi3": Family(attention=(*NORM_FIRST, "resid_attn_dropout"), rms_norm=LLAMA_NORM),
    "qwen2": Family(attention=NORM_FIRST, rms_norm=LLAMA_NORM, llama_attention=True),
    "qwen2_moe": Family(attention=NORM_FIRST, rms_norm=LLAMA_NORM),
    "qwen3": Family(attention=NORM_FIRST, rms_norm=LLAMA_NORM, llama_attention=True),
    "qwen3_moe": Family(attention=NORM_FIRST, rms_norm=LLAMA_NORM),
    "smollm3": Family(attention=NORM_FIRST, rms_norm=LLAMA_NORM),
    "starcoder2": Family(
        embedding_dropout="embedding_dropout", attention=NORM_FIRST, outputs=("mlp.c_proj",)
    ),
}
# types of language models that are run with their vision tower only
LANGUAGE_FAMILIES: Mapping[str, Family] = {
    "qwen2_vl_text": Family(attention=NORM_FIRST, rms_norm=LLAMA_NORM),
    "qwen2_5_vl_text": Family(attention=NORM_FIRST, rms_norm=LLAMA_NORM),
    "qwen3_vl_text": Family(attention=NORM_FIRST, rms_norm=LLAMA_NORM),
    "qwen3_vl_moe_text": Family(attention=NORM_FIRST, rms_norm=LLAMA_NORM),
}
# multimodal model_type -> its text model is trained, the rest of the checkpoint is left alone
TEXT_PART_OF = ("gemma3", "mistral3")


def supported_families() -> str:
    """List the names of the families, separated by commas, for messages."""
    return ", ".join(sorted([*FAMILIES, *(f"{name} (text part)" for name in TEXT_PART_OF)]))


def refuse(path: str, model_type: str, reason: str) -> ConfigError:
    """The error for a model that cannot be trained."""
    return ConfigError(
        f'{path}: model_type "{model_type}" is not supported: {reason}; '
        f"supported: {supported_families()}"
    )


def text_settings(model: Mapping[str, object]) -> Mapping[str, object]:
    """config.json of the language model: the file itself, or its `text_config`."""
    text = model.get("text_config")
    return text if isinstance(text, Mapping) else model


def check_family(path: str, model: Mapping[str, object]) -> None:
    """Refuse by config.json alone what is known not to work. Unknown families pass: they are tried
    out when the model is laid out.

    Raises:
        ConfigError: with the reason and the families that are supported.
    """
    settings = text_settings(model)
    model_type = str(settings.get("model_type", model.get("model_type")))
    if model.get("is_encoder_decoder"):
        raise refuse(path, model_type, "it has an encoder")
    family = FAMILIES.get(model_type)
    for key in family.refused if family is not None else ():
        if settings.get(key):
            raise refuse(path, model_type, f"{key} = {settings[key]!r} in config.json")
