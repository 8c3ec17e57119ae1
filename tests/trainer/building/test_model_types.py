"""A checkpoint of every accepted type is trained, saved, merged and read again, buffers and all."""

from pathlib import Path

import pytest
import torch
from model_types import TYPES, architecture_for
from safetensors.torch import load_file
from saved_parts import saved_adapter, saved_model, step
from tiny_families import build, config_of, make_batch, reference_loss, run_forward
from transformers import AutoModelForCausalLM

from headrace.schemas.errors import ConfigError
from headrace.trainer.building.self_check import save_tiny
from headrace.trainer.export.merge import merge
from headrace.trainer.stage.acceleration import attend_by_bounds, runs_without_masks

TOLERANCE = 1e-5
PAGE = Path(__file__).parents[3] / "docs" / "families.md"
SHORT = (
    *("apertus", "deepseek_v3", "ernie4_5_moe", "gemma4_text"),
    *("falcon_h1", "nemotron_h", "qwen3_next", "recurrent_gemma"),
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(directory):
    return {k: t for f in directory.glob("*.safetensors") for k, t in load_file(f).items()}


def transformers_loss(directory, batch):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(reference_loss(model, batch)[0])


def our_loss(built, batch):
    for part in built:
        part.stage.eval()
    with torch.no_grad():
        return run_forward(built, batch)[-1].value.item()


def types():
    for model_type in TYPES:
        marks = [] if model_type in SHORT else [pytest.mark.exhaustive]
        yield pytest.param(model_type, marks=marks)


@pytest.mark.parametrize("model_type", list(types()))
def test_what_is_trained_and_written_is_what_transformers_reads(model_type, tmp_path):
    try:
        architecture = architecture_for(model_type, tiny=True)
    except ConfigError as error:
        assert model_type not in SHORT, error
        return
    base, batch = tmp_path / "base", make_batch()
    base.mkdir()
    save_tiny(architecture, base)
    settings = {"router_loss": 0.0}
    try:
        built = build(config_of(base, 2, {"rank": 4}, **settings))
    except ConfigError as error:
        assert model_type not in SHORT, error
        return
    assert our_loss(built, batch) == pytest.approx(transformers_loss(base, batch), rel=TOLERANCE)
    step(built)
    expected = our_loss(built, batch)
    merge(base, saved_adapter(built, tmp_path / "adapter"), tmp_path / "merged")
    assert transformers_loss(tmp_path / "merged", batch) == pytest.approx(expected, rel=TOLERANCE)
    whole = build(config_of(base, 2, **settings))
    step(whole)
    expected = our_loss(whole, batch)
    saved_model(whole, base, tmp_path / "model")
    assert transformers_loss(tmp_path / "model", batch) == pytest.approx(expected, rel=TOLERANCE)
    names = weights(base).keys()
    assert weights(tmp_path / "merged").keys() == weights(tmp_path / "model").keys() == names


@pytest.mark.parametrize(
    "model_type",
    [*SHORT[1:2], *(pytest.param(name, marks=pytest.mark.exhaustive) for name in TYPES)],
)
def test_attention_by_bounds_is_that_under_masks(model_type, tmp_path):
    try:
        save_tiny(architecture_for(model_type, tiny=True), tmp_path)
        built, batch = build(config_of(tmp_path, 2, router_loss=0.0)), make_batch()
    except ConfigError:
        return
    expected = our_loss(built, batch)
    for part in built:
        if runs_without_masks(part.architecture, torch.bfloat16):
            attend_by_bounds(part.stage)
            part.stage.by_bounds = True
    assert our_loss(built, batch) == pytest.approx(expected, rel=1e-6)


def test_the_page_says_what_becomes_of_every_type():
    page = PAGE.read_text()
    missing = [model_type for model_type in TYPES if f"`{model_type}`" not in page]
    assert missing == [], "run make families"
