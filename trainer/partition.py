"""Cuts a model's layers into pipeline stages of about equal cost."""

from itertools import pairwise
from typing import Any


def layer_cost(model_config: Any) -> float:
    """Weights that one decoder layer multiplies a token with."""
    hidden = model_config.hidden_size
    head_size = (
        getattr(model_config, "head_dim", None) or hidden // model_config.num_attention_heads
    )
    attention = (
        2
        * hidden
        * head_size
        * (model_config.num_attention_heads + model_config.num_key_value_heads)
    )
    return float(attention + 3 * hidden * model_config.intermediate_size)


def cut(model_config: Any, stages: int) -> list[range]:
    """The decoder layers of each stage: the slowest stage is as fast as it can be.

    The head counts with its size (that of an 8B Llama costs 2.2 layers); the embedding is a look-up
    and costs nothing. Each stage has a layer, so there may not be more stages than layers.
    """
    layers = model_config.num_hidden_layers
    assert 1 <= stages <= layers
    head = model_config.vocab_size * model_config.hidden_size / layer_cost(model_config)
    if stages == 1:
        return [range(layers)]
    last = min(range(1, layers - stages + 2), key=lambda n: _slowest(layers, stages, n, head))
    rest = layers - last
    sizes = [rest // (stages - 1) + (i < rest % (stages - 1)) for i in range(stages - 1)] + [last]
    bounds = [sum(sizes[:index]) for index in range(stages + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _slowest(layers: int, stages: int, last: int, head: float) -> tuple[float, int]:
    """Cost of the slowest stage if the last has `last` layers; ties go to the fuller last stage."""
    others = -(-(layers - last) // (stages - 1))
    return max(others, last + head), -last
