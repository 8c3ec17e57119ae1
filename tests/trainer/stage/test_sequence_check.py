"""Models whose rows cannot be cut are refused by name, before weights are loaded."""

import pytest
import torch
from model_types import architecture_for
from tiny_families import config_of, save_tiny, tiny_config
from torch import nn

from headrace.schemas.errors import ConfigError
from headrace.trainer import preflight
from headrace.trainer.architecture.read_architecture import architecture_of
from headrace.trainer.building.self_check import plan_model, tiny_spec
from headrace.trainer.layers.sequence_attention import check_heads
from headrace.trainer.stage import sequence_check


def tiny(family):
    return tiny_spec(architecture_of(tiny_config(family), family))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "phi3"])
def test_models_that_mix_tokens_in_attention_alone_pass(family):
    assert sequence_check.find_mixing(tiny(family)) is None


def test_an_attention_of_its_own_is_refused_by_name(tmp_path):
    model = save_tiny("falcon", tmp_path / "model")
    with pytest.raises(ConfigError, match=r'sequence_parallel = 2 .* "falcon": of 4 layers 0'):
        plan_model(config_of(model, sequence_parallel=2))
    plan_model(config_of(model))


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba"])
def test_layers_with_a_state_are_refused(model_type):
    spec = tiny_spec(architecture_for(model_type, tiny=True))
    assert "carry a state from token to token" in sequence_check.find_mixing(spec)
    assert "carry a state from token to token" in sequence_check.find_unsliced(spec)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "phi3"])
def test_models_whose_rows_can_go_in_slices_pass(family):
    assert sequence_check.find_unsliced(tiny(family)) is None


def test_what_slices_do_not_go_with_is_refused_by_name(tmp_path):
    model = save_tiny("falcon", tmp_path / "model")
    with pytest.raises(ConfigError, match=r'sequence_slices = 3 .* "falcon": of 4 layers 0'):
        plan_model(config_of(model, sequence_slices=3))
    reasons = {
        'schedule = "interleaved"': {"schedule": "interleaved", "pipeline_stages": 2},
        'objective.kind = "dpo"': {"objective": {"kind": "dpo"}},
    }
    for reason, settings in reasons.items():
        settings = {**settings, "gradient_accumulation_steps": 2}
        with pytest.raises(ValueError, match=f"sequence_slices = 3 does not go with {reason}"):
            config_of(model, sequence_slices=3, **settings)
        config_of(model, **settings)


def test_rows_must_be_divisible_into_slices(tmp_path):
    config = config_of(tmp_path, sequence_slices=3)
    with pytest.raises(ConfigError, match=r"sequence_slices = 3 does not divide rows of 64"):
        preflight.check_sequence(config, {}, 64)
    preflight.check_sequence(config, {}, 66)


@pytest.mark.parametrize("model_type", ["gptj", "dbrx"])
def test_models_whose_width_has_another_name_are_made_small(model_type):
    assert next(tiny_spec(architecture_for(model_type, tiny=True)).tree.parameters()).ndim == 2


class Shifted(nn.Module):
    """Takes a part of each token from the one before, as token shifts and convolutions do."""

    def forward(self, hidden):
        return hidden + torch.roll(hidden, 1, dims=1)


def test_tokens_that_are_mixed_elsewhere_are_noticed():
    spec = tiny("llama")
    spec.layer_modules[1].mlp = Shifted()
    assert sequence_check.find_mixing(spec) == "tokens are mixed outside of its attention"
    spec = tiny("llama")
    spec.layer_modules[1].mlp = Shifted()
    found = sequence_check.find_unsliced(spec)
    assert found == "slices of a row give something else than the row"


def test_a_mask_that_a_layer_cuts_is_noticed(monkeypatch):
    plain = sequence_check.TokenAlone.__call__

    def cutting(self, module, query, key, value, mask, **others):
        return plain(self, module, query, key, value, mask[..., : key.shape[2]], **others)

    monkeypatch.setattr(sequence_check.TokenAlone, "__call__", cutting)
    assert sequence_check.find_mixing(tiny("llama")) == "its attention cuts its mask"


@pytest.mark.parametrize(
    ("tokens", "heads", "reason"),
    [
        (65, 4, "does not divide rows of 65 tokens; .* loader.tokens_per_row = 66"),
        (64, 9, "does not divide the 9 attention heads of"),
    ],
)
def test_rows_and_heads_must_be_divisible(tmp_path, tokens, heads, reason):
    config = config_of(tmp_path, sequence_parallel=2)
    with pytest.raises(ConfigError, match=f"sequence_parallel = 2 {reason}"):
        preflight.check_sequence(config, {"num_attention_heads": heads}, tokens)
    preflight.check_sequence(config_of(tmp_path), {"num_attention_heads": heads}, tokens)
    with pytest.raises(ConfigError, match="divide the 9 attention heads"):
        check_heads(9, 2)


def test_answers_are_not_generated_by_ranks_that_share_rows(tmp_path):
    settings = {"objective": {"kind": "dpo"}, "rejected_sampling": {}}
    with pytest.raises(ValueError, match="sequence_parallel = 2 does not go with"):
        config_of(tmp_path, sequence_parallel=2, **settings)
    config_of(tmp_path, **settings)
