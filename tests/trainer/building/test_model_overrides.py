"""Positions other than the model's own: equal to transformers by the config that is saved."""

import re

import pytest
import torch
from peft import PeftModel
from saved_parts import saved_adapter, saved_model, step
from tiny_families import build, config_of, make_batch, reference_loss, run_stages, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.schemas.errors import ConfigError
from headrace.trainer.adapters.peft_settings import read_overrides
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.export.merge import merge

FACTORS = [1.0, 1.5, 2.0, 2.5]
SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 8.0},
    "yarn with a mean": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.2},
    "longrope": {
        "short_factor": FACTORS,
        "long_factor": [2 * factor for factor in FACTORS],
        "original_max_position_embeddings": 10,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
        "rope_theta": 5000.0,
    },
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("overrides") / "llama")


def overrides_of(name):
    scaling = {"rope_type": name} | SCALINGS[name]
    return {"max_position_embeddings": 9, "rope_scaling": scaling}


def loss_by_transformers(model):
    return reference_loss(model.eval(), make_batch())[0].item()


def load(directory, **settings):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **settings)


@pytest.mark.parametrize("name", SCALINGS)
def test_a_model_with_other_positions_is_that_of_transformers_by_the_saved_config(
    llama, tmp_path, name
):
    built = build(config_of(llama, 2, model_overrides=overrides_of(name)))
    loss, _, _ = run_stages(built, make_batch())
    saved = saved_model(built, llama, tmp_path / "saved")
    assert loss_by_transformers(load(saved)) == pytest.approx(loss, rel=1e-5)
    assert abs(loss_by_transformers(load(llama)) - loss) > 1e-4
    config = AutoConfig.from_pretrained(saved)
    assert config.max_position_embeddings == 9
    own = {"rope_theta": AutoConfig.from_pretrained(llama).rope_parameters["rope_theta"]}
    given = own | overrides_of(name)["rope_scaling"]
    if name == "yarn with a mean":
        given["original_max_position_embeddings"] = 64
    assert config.rope_parameters == given


def test_an_adapter_says_what_positions_the_model_under_it_must_have(llama, tmp_path):
    built = build(config_of(llama, 1, {"rank": 4}, model_overrides=overrides_of("yarn")))
    step(built)
    loss, _, _ = run_stages(built, make_batch())
    adapter = saved_adapter(built, tmp_path / "adapter")
    scaling = read_overrides(adapter).rope_scaling
    assert scaling is not None and scaling.factor == 4.0
    merge(llama, adapter, tmp_path / "merged")
    assert loss_by_transformers(load(tmp_path / "merged")) == pytest.approx(loss, rel=1e-5)
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    theirs = PeftModel.from_pretrained(load(llama, config=config), adapter)
    assert loss_by_transformers(theirs) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        (
            "gemma3_text",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "differ by layer",
        ),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, 'rope_type = "yarn" needs factor'),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 2.0}},
            'beta_fast has no meaning with rope_type = "linear"',
        ),
    ],
)
def test_positions_that_a_model_cannot_have_are_refused(tmp_path, family, overrides, message):
    directory = save_tiny(family, tmp_path / family)
    with pytest.raises((ConfigError, ValueError), match=re.escape(message)):
        plan_model(config_of(directory, 1, model_overrides=overrides))
