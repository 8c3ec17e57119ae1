"""Stages are cut by cost, the head counted, or as the config says."""

from itertools import pairwise, product

import pytest
from tiny_families import config_of
from transformers import LlamaConfig, MixtralConfig

from headrace.schemas.errors import ConfigError
from headrace.trainer.architecture.read_architecture import architecture_of, lay_out
from headrace.trainer.building.model_size import measure
from headrace.trainer.building.partition import cut, partition

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)


def size_of(config):
    architecture = architecture_of(config, "model")
    model = lay_out(architecture).requires_grad_(False)
    return measure(model, architecture)


@pytest.fixture(scope="module")
def llama():
    return size_of(LLAMA_8B)


def layers_of(size, stages, **settings):
    return [len(part) for part in partition(config_of("model", stages, **settings), size)]


def test_the_head_of_an_8b_llama_takes_the_place_of_layers(llama):
    assert layers_of(llama, 4) == [9, 9, 8, 6]


def test_by_memory_the_embedding_counts_as_well(llama):
    assert layers_of(llama, 4, partition="memory") == [7, 9, 9, 7]


def test_uniform_stages_have_as_many_layers_each(llama):
    assert layers_of(llama, 4, partition="uniform") == [8, 8, 8, 8]
    assert layers_of(llama, 5, partition="uniform") == [7, 7, 6, 6, 6]


def test_a_list_is_taken_as_it_is(llama):
    assert layers_of(llama, 3, partition=[20, 2, 10]) == [20, 2, 10]
    spans = partition(config_of("model", 3, partition=[19.5, 2, 10.5]), llama)
    assert [str(span) for span in spans] == [
        "0-19 (attention)",
        "19 (mlp)-21 (attention)",
        "21 (mlp)-31",
    ]


def test_halves_balance_stages_better(llama):
    def balance(stages, **settings):
        spans = partition(config_of("model", stages, **settings), llama)
        work = [
            sum(part.active for part in llama.parts(span, stage, stages))
            for stage, span in enumerate(spans)
        ]
        return sum(work) / stages / max(work)

    gains = {n: balance(n, half_layers=True) - balance(n) for n in range(2, 17)}
    assert min(gains.values()) >= 0
    assert gains[8] > 0.03


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([16, 16], r"partition = \[16, 16\] has 2 entries, but pipeline_stages = 3"),
        ([9, 9, 9], r"partition = \[9, 9, 9\] adds up to 27, but the model has 32 layers"),
    ],
)
def test_a_list_that_does_not_fit_is_named(llama, sizes, message):
    with pytest.raises(ConfigError, match=message):
        layers_of(llama, 3, partition=sizes)


@pytest.mark.parametrize("stages", range(1, 33))
def test_every_layer_is_in_exactly_one_stage_and_no_stage_is_empty(stages):
    parts = cut([1.0] * 32, stages, last=2.2)
    assert len(parts) == stages
    assert all(len(part) > 0 for part in parts)
    assert parts[0].start == 0
    assert parts[-1].stop == 32
    assert all(left.stop == right.start for left, right in pairwise(parts))


def test_no_cut_has_a_cheaper_dearest_stage():
    costs, first, last = [3.0, 1.0, 1.0, 4.0, 1.0, 2.0, 2.0], 0.5, 2.5

    def dearest(bounds):
        sums = [sum(costs[start:stop]) for start, stop in pairwise(bounds)]
        return max([sums[0] + first, *sums[1:-1], sums[-1] + last])

    for stages in (2, 3, 4):
        bounds = [part.start for part in cut(costs, stages, first, last)] + [len(costs)]
        inner = product(range(1, len(costs)), repeat=stages - 1)
        every = [(0, *c, len(costs)) for c in inner if all(a < b for a, b in pairwise(c))]
        assert dearest(bounds) == min(map(dearest, every))


def test_of_a_mixture_only_the_experts_in_use_count_as_work():
    size = size_of(MixtralConfig(num_hidden_layers=2))
    layer = size.layers[0]
    assert layer.weights == pytest.approx(1.451e9, rel=1e-3)
    assert layer.active == pytest.approx(0.394e9, rel=1e-3)  # attention, and 2 experts of 8
