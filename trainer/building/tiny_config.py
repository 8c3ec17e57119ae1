"""A config of the same kind as a model's, that is cheap to run: narrow, and with few layers."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headrace.trainer.architecture.state_sizes import is_size, set_state_sizes
from headrace.trainer.families.attention import layer_count

HEAD = 16  # numbers of an attention head
MOST_LAYERS = 8
SHORT_TEXT = 8  # tokens up to which rotary frequencies do not depend on the length
# what is set wherever the config has a value for it
SET = {
    "vocab_size": 97,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "head_dim": HEAD,
    "kv_channels": HEAD,
    "v_head_dim": HEAD,
    "qk_nope_head_dim": HEAD,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "sliding_window": 6,
    "attention_chunk_size": 6,
    "intermediate_size_mlp": 48,
    "expert_ffn_hidden_size": 16,
    "index_n_heads": 4,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 97,
    "laurel_rank": 8,
    "index_head_dim": HEAD,
    "original_max_position_embeddings": SHORT_TEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# what is made smaller if it is larger
AT_MOST = {
    "n_group": 4,
    "num_expert_group": 4,
    "topk_group": 2,
    "num_limited_groups": 2,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
KEY_HEADS = ("num_key_value_heads", "num_global_key_value_heads", "num_kv_heads", "kv_n_heads")
GROUPS = ("n_group", "num_expert_group")
LAYER_NUMBERS = ("mlp_only_layers", "attn_layer_indices", "moe_layers")


def shrink(config: Any) -> Any:
    """Return a config of the same kind that is cheap to run.

    Divisors stay divisors: experts of their groups, the rotary part of its head. Of the layers, one
    of each combination of per-layer settings is kept, and the first two.
    """
    values = copy.deepcopy(config.to_dict())
    layers_key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    layers = layer_count(config)
    if layers != config.num_hidden_layers:
        layers_key = "num_layers"
    sharing = values.get("num_kv_shared_layers") or 0
    kept = kept_layers(values, layers, getattr(config, "layer_types", None), sharing)
    keep_layers(values, kept, layers)
    if sharing:
        values["num_kv_shared_layers"] = sum(layer >= layers - sharing for layer in kept)
    set_sizes(values, config)
    if layers_key in values:  # else it is how many types are listed
        values[layers_key] = len(kept)
    return type(config)(**values)


def kept_layers(
    values: Mapping[str, Any], layers: int, types: Sequence[str] | None = None, sharing: int = 0
) -> list[int]:
    """Return the numbers of the first two layers and of the first of each kind.

    Where types follow from other settings, such as a period, all layers before these are kept too.

    Args:
        types: of the layers.
        sharing: how many of the last take over keys and values.
    """
    if types is not None and not any(list(types) == value for value in values.values()):
        last = max(list(types).index(kind) for kind in set(types))
        return list(range(min(layers, max(last + 1, 4 if len(set(types)) == 1 else 2))))
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == layers]
    own = layers - sharing
    kinds = [str([layer < own, *(value[layer] for value in lists)]) for layer in range(layers)]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    return sorted({*first[:MOST_LAYERS], *range(min(layers, 4 if len(first) == 1 else 2))})


def keep_layers(values: dict[str, Any], kept: list[int], layers: int) -> None:
    """Drop the settings of other layers, in place: lists by layer, and numbers of layers."""
    for key, value in values.items():
        if isinstance(value, list) and len(value) == layers:
            values[key] = [value[layer] for layer in kept]
        elif key == "per_layer_config" and value:
            by_number = {int(layer): changes for layer, changes in value.items()}
            places = enumerate(kept)
            values[key] = {place: by_number[layer] for place, layer in places if layer in by_number}
        elif key in LAYER_NUMBERS and value:
            values[key] = [place for place, layer in enumerate(kept) if layer in value]


def set_sizes(values: dict[str, Any], config: Any) -> None:
    """Set the sizes of a config and of the tables in it, in place."""

    before = dict(values)
    text_heads = getattr(config, "num_attention_heads", None) or 1  # a model without attention
    head = values.get("head_dim") or config.hidden_size // text_heads
    grouped = any((values.get(key) or 1) > 1 for key in GROUPS)
    for table in tables(values):
        wider = is_size(table.get("head_dim")) and table["head_dim"] > head
        table |= {key: value for key, value in SET.items() if is_size(table.get(key))}
        table |= {k: [SET[k]] * len(table[k]) for k in SET if isinstance(table.get(k), list)}
        table |= {k: min(v, table[k]) for k, v in AT_MOST.items() if is_size(table.get(k))}
        table |= {k: 8 if grouped else 4 for k in EXPERTS if is_size(table.get(k)) and table[k] > 1}
        if wider:  # as gemma4's in its layers with full attention
            table["head_dim"] = 2 * HEAD
        for key in KEY_HEADS:
            if is_size(table.get(key)):
                table[key] = fewer_heads(table[key], text_heads)
        if is_size(table.get("rotary_dim")):
            table["rotary_dim"] = max(2, HEAD * table["rotary_dim"] // head // 2 * 2)
        for key in ("short_factor", "long_factor"):  # a number for each frequency
            if isinstance(table.get(key), list):
                part = before.get("qk_rope_head_dim") or 0
                size = len(table[key]) * HEAD // (2 * part if part else head)
                table[key] = (table[key] * HEAD)[: max(1, size)]
    if is_size(values.get("qk_rope_head_dim")):
        set_rope_part(values)
    set_state_sizes(values, before)


def set_rope_part(values: dict[str, Any]) -> None:
    """Set the rotary part of a head that has another beside it (multi-head latent attention).

    In configs of such models `head_dim` is that part.
    """
    values["qk_rope_head_dim"] = HEAD // 2
    sizes = {"head_dim": HEAD // 2, "qk_head_dim": HEAD // 2 + HEAD}
    values |= {key: size for key, size in sizes.items() if is_size(values.get(key))}


def fewer_heads(key_heads: int, heads: int) -> int:
    """Return how many key heads the tiny model has beside its 4 heads: 1, 2 or 4."""
    return 4 if key_heads >= heads else 1 if key_heads == 1 else 2


def tables(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config and all tables in it."""
    yield values
    for part in list(values.values()):
        if isinstance(part, dict):
            yield from tables(part)
