"""MLPs that go tile by tile give what they give of all tokens at once, and hold less."""

import pytest
import torch
from tiny_families import build, config_of, gradients_of, make_batch, run_stages, save_tiny

from headrace.schemas.errors import ConfigError
from headrace.trainer.building.self_check import plan_model

LORA = {"rank": 4, "dropout": 0.0}


def results(model, **settings):
    """Return the losses of tokens and the gradients of a step."""
    built = build(config_of(model, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for item in built[0].trained:
            item.parameter.add_(torch.randn(item.parameter.shape, generator=generator) * 0.05)
    built[0].stage.train()
    _, losses, _ = run_stages(built, make_batch())
    return losses, {name: g for name, g in gradients_of(built).items() if g is not None}


def compare(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    norm = torch.stack([g.norm() for g in expected[1].values()]).norm()
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * norm, name


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.exhaustive) for f in ("gemma2", "phi"))]
)
@pytest.mark.parametrize("again", ["none", "attention", "full"])
def test_losses_and_gradients_are_those_of_whole_mlps(family, again, tmp_path):
    model = save_tiny(family, tmp_path / "model")
    for adapter in (LORA, {"kind": "none"}):
        whole = results(model, adapter=adapter)
        tiled = results(model, adapter=adapter, activation_checkpointing=again, tiles=5)
        compare(tiled, whole)


def test_an_mlp_sees_a_tile_of_the_tokens_at_a_time(tmp_path):
    built = build(config_of(save_tiny("llama", tmp_path / "model"), tiles=5))
    seen = []
    mlp = built[0].stage.layers[0].mlp
    mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    run_stages(built, make_batch())
    assert sorted(seen) == sorted(2 * [5, 5, 5, 5, 4]), "forward, and again"
    assert mlp.__class__.__name__ == "LlamaMLP"
    assert "model.layers.0.mlp.down_proj.weight" in gradients_of(built)


def test_dropout_is_drawn_again_as_it_was(tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    adapter = {"rank": 4, "dropout": 0.3}
    once = results(model, adapter=adapter, tiles=3)
    again = results(model, adapter=adapter, tiles=3, activation_checkpointing="full")
    assert all(torch.equal(again[1][name], gradient) for name, gradient in once[1].items())
    whole = results(model, adapter=adapter)
    assert not torch.allclose(whole[0], once[0]), "there was no dropout"


def test_what_tiles_do_not_go_with_is_refused_by_name(tmp_path):
    mixture = save_tiny("qwen2_moe", tmp_path / "mixture")
    with pytest.raises(ConfigError, match=r'tiles = 4 .* "qwen2_moe": of . layers . have an MLP'):
        plan_model(config_of(mixture, tiles=4))
    for reason, settings in {
        "activation_checkpointing": {"activation_checkpointing": "selective"},
        "weight_offload": {"weight_offload": "mlp", "adapter": LORA},
        "tensor_parallel": {"tensor_parallel": 2, "adapter": LORA},
    }.items():
        pair = rf"tiles = 4 does not go with {reason}|{reason} = 2 does not go with tiles"
        with pytest.raises(ValueError, match=pair):
            config_of(mixture, tiles=4, **settings)
        config_of(mixture, **settings)
