"""Variants of published checkpoints equal transformers, of rows with several documents."""

from types import SimpleNamespace

import pytest
import torch
from model_types import TYPES
from tiny_families import build, config_of, gradients_of, make_batch, run_forward, run_stages
from variants import VARIANTS, differences, variant

from headrace.schemas.errors import ConfigError
from headrace.trainer.families.attention import Chunk, window_of
from headrace.trainer.families.limits import check_lengths
from headrace.trainer.layers.attention_mask import attention_masks
from headrace.trainer.stage.acceleration import attend_by_bounds, runs_without_masks

TOLERANCE = 1e-5
SHORT = (
    *("starcoder", "opt-350m", "bloom-6-heads", "mpt-6-heads", "falcon-alibi", "nanochat"),
    *("llama4-maverick", "gemma-3n", "gemma-4-e2b", "glm-5-shared", "granite-swa", "minicpm3"),
)


def variants():
    for name in VARIANTS:
        marks = [] if name in SHORT else [pytest.mark.exhaustive]
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(variants()))
def test_losses_and_gradients_are_those_of_each_document_alone(name, tmp_path):
    model = variant(name, tmp_path / name)
    modes = [("full", 2), ("lora", 2)] + [("full", 1), ("lora", 1)] * (name not in SHORT)
    for kind, stages in modes:
        assert max(differences(model, stages, kind)) <= TOLERANCE, (kind, stages)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list(VARIANTS))
def test_attention_by_bounds_is_that_under_masks(name, tmp_path):
    built, batch = build(config_of(variant(name, tmp_path), 2, router_loss=0.0)), make_batch()
    if not runs_without_masks(built[0].architecture, torch.bfloat16):
        return
    for part in built:
        part.stage.eval()
    with torch.no_grad():
        expected = run_forward(built, batch)[-1].value.item()
        for part in built:
            attend_by_bounds(part.stage)
            part.stage.by_bounds = True
        assert run_forward(built, batch)[-1].value.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["gemma-3n", "gemma-4-e2b"])
def test_what_layers_hand_on_beside_hidden_states_passes_between_any_stages(name, tmp_path):
    """Recomputed or not, layers get keys and values of others, and pass gradients on to them."""
    model, batch = variant(name, tmp_path), make_batch()
    found = []
    for stages, settings in ((1, {}), (3, {"activation_checkpointing": "full"})):
        built = build(config_of(model, stages, None, **settings))
        losses = run_stages(built, batch)[1]
        found.append((losses, gradients_of(built)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


def test_what_knows_hidden_states_alone_is_refused_where_there_is_more(tmp_path):
    adapter = {"kind": "control", "rank": 2}
    with pytest.raises(ConfigError, match="whose layers hand on more than hidden states"):
        build(config_of(variant("gemma-4-e2b", tmp_path), 1, adapter))


def test_new_blocks_whose_outputs_are_not_known_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="layers differ by number"):
        build(config_of(variant("llama4-maverick", tmp_path), 1, {"kind": "blocks", "blocks": 1}))


def test_chunks_without_a_size_are_refused():
    config = SimpleNamespace(attention_chunk_size=None, sliding_window=None)
    assert window_of(config, "full_attention") is None
    with pytest.raises(ConfigError, match="attention_chunk_size = None gives no chunks"):
        window_of(config, "chunked_attention")


def test_a_chunk_is_a_document_to_attention_and_no_window():
    assert Chunk(5).documents([[12, 5, 3]]) == [[5, 5, 2, 5, 3]]
    assert Chunk(5) == Chunk(5)
    assert Chunk(5) != 5
    assert len({Chunk(5), 5}) == 2
    masks = attention_masks([[7, 5]], [Chunk(4)], torch.device("cpu"))
    assert masks[Chunk(4)][0, 0, 6].nonzero().flatten().tolist() == [4, 5, 6]


def test_every_variant_is_of_a_type_that_transformers_has():
    assert {model_type for model_type, _ in VARIANTS.values()} <= {*TYPES}


def test_rows_that_a_family_has_no_place_for_are_refused_with_the_key():
    check_lengths("model", {"model_type": "gpt_neo"}, document=2048, row=2048)
    with pytest.raises(ConfigError, match=r"rows may have 4096 tokens, but max_pos.* 2048"):
        check_lengths("model", {"model_type": "gpt_neo"}, document=2048, row=4096)
    check_lengths("model", {"model_type": "mpt", "max_seq_len": 64}, document=64, row=128)
    with pytest.raises(ConfigError, match="documents may have 65 tokens, but max_seq_len = 64"):
        check_lengths("model", {"model_type": "mpt", "max_seq_len": 64}, document=65, row=128)
