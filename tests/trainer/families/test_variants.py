"""Variants of published checkpoints equal transformers, of rows with several documents."""

import pytest
import torch
from model_types import TYPES
from tiny_families import build, config_of, make_batch, run_forward
from variants import VARIANTS, differences, variant

from headrace.schemas.errors import ConfigError
from headrace.trainer.families.limits import check_lengths
from headrace.trainer.stage.acceleration import attend_by_bounds, runs_without_masks

TOLERANCE = 1e-5
SHORT = ("starcoder", "opt-350m", "bloom-6-heads", "mpt-6-heads", "falcon-alibi", "nanochat")


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


def test_every_variant_is_of_a_type_that_transformers_has():
    assert {model_type for model_type, _ in VARIANTS.values()} <= {*TYPES}


def test_rows_that_a_family_has_no_place_for_are_refused_with_the_key():
    check_lengths("model", {"model_type": "gpt_neo"}, document=2048, row=2048)
    with pytest.raises(ConfigError, match=r"rows may have 4096 tokens, but max_pos.* 2048"):
        check_lengths("model", {"model_type": "gpt_neo"}, document=2048, row=4096)
    check_lengths("model", {"model_type": "mpt", "max_seq_len": 64}, document=64, row=128)
    with pytest.raises(ConfigError, match="documents may have 65 tokens, but max_seq_len = 64"):
        check_lengths("model", {"model_type": "mpt", "max_seq_len": 64}, document=65, row=128)
