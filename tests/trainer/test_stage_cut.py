"""Stages are cut by cost, the head counted."""

from itertools import pairwise

import pytest
from transformers import LlamaConfig

from headrace.trainer.partition import cut

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)


def test_the_head_of_an_8b_llama_takes_the_place_of_layers():
    assert [len(layers) for layers in cut(LLAMA_8B, 4)] == [9, 9, 8, 6]


@pytest.mark.parametrize("stages", range(1, 33))
def test_every_layer_is_in_exactly_one_stage_and_no_stage_is_empty(stages):
    parts = cut(LLAMA_8B, stages)
    assert len(parts) == stages
    assert all(len(part) > 0 for part in parts)
    assert parts[0].start == 0
    assert parts[-1].stop == 32
    assert all(left.stop == right.start for left, right in pairwise(parts))
