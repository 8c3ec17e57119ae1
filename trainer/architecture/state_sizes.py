"""Sizes of layers with a state, in a config that is made cheap to run."""

from typing import Any

HEAD = 16  # numbers of a head
STATE = 8  # numbers that a channel's state has
CHUNK = 4  # tokens that are computed at once, fewer than the trial's documents have
# what is set wherever the config has a number for it
STATE_SIZES = {
    "linear_head_dim": HEAD,
    "linear_num_heads": 2,
    "mamba_d_state": STATE,
    "ssm_state_size": STATE,
    "state_size": STATE,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "chunk_size": CHUNK,
    "mamba_chunk_size": CHUNK,
    "block_size": CHUNK,
    "lru_width": 64,
    "attention_window_size": 6,
    "moe_latent_size": 24,
    "moe_shared_expert_intermediate_size": 16,
}
GROUPS = ("n_groups", "mamba_n_groups", "mamba_ngroups")  # of heads that share a state's inputs
# names of the number of heads, and of the numbers of each; their product is the mixer's width
HEADS = {
    "mamba_n_heads": "mamba_d_head",
    "mamba_num_heads": "mamba_head_dim",
    "num_heads": "head_dim",
    "n_mamba_heads": "mamba_headdim",
}


def set_state_sizes(values: dict[str, Any], original: dict[str, Any]) -> None:
    """Set the sizes of layers with a state, in place.

    Args:
        values: of the config, other sizes set.
        original: what they were.
    """
    values |= {key: size for key, size in STATE_SIZES.items() if is_size(original.get(key))}
    width = values.get("hidden_size", 0) * expansion(original)  # families of states have that name
    for key in GROUPS:
        if is_size(original.get(key)):
            values[key] = min(2, original[key])
    for heads, size in HEADS.items():
        if is_size(original.get(heads)) and is_size(original.get(size)):
            values |= {heads: width // HEAD, size: HEAD}
    if is_size(original.get("mamba_d_ssm")):
        values["mamba_d_ssm"] = width
    if "state_size" in original and is_size(original.get("intermediate_size")):
        values["intermediate_size"] = width  # of Mamba's mixers, which are no MLPs
    set_delta_sizes(values, original)


def set_delta_sizes(values: dict[str, Any], original: dict[str, Any]) -> None:
    """Set the heads of delta nets, in place; values have as many more as in the model."""
    for key, value, size in (
        ("linear_num_key_heads", "linear_num_value_heads", 2),
        ("linear_key_head_dim", "linear_value_head_dim", HEAD),
    ):
        if is_size(original.get(key)) and is_size(original.get(value)):
            values |= {key: size, value: size * max(1, original[value] // original[key])}


def expansion(original: dict[str, Any]) -> int:
    """Return how many times as wide as the hidden states a mixer is."""
    return int(original.get("mamba_expand") or original.get("expand") or 2)


def is_size(value: object) -> bool:
    """Return whether a setting is a number that may be made smaller."""
    return isinstance(value, int) and not isinstance(value, bool)
