"""Which modules get adapters, and what is trained in full: named, matched, or refused."""

import logging
import re

import pytest
import torch
from other_mixtures import OTHERS, save_other
from peft.tuners.lora import LoraLayer
from tiny_families import (
    build,
    config_of,
    gradients_of,
    make_batch,
    reference_loss,
    run_stages,
    save_tiny,
)
from transformers import AutoModelForCausalLM

from headrace.schemas.errors import ConfigError
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.export.export import adapter_tensors
from headrace.trainer.export.merge import merge


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("targets")

    def get(family):
        folder = directory / family
        if folder.exists():
            return folder
        return save_other(family, folder) if family in OTHERS else save_tiny(family, folder)

    return get


def adapted(model, **adapter):
    """The last two parts of the names of all modules with adapters."""
    plan = plan_model(config_of(model, 1, {"kind": "lora", "rank": 2, **adapter}))
    return {
        ".".join(name.split(".")[-2:])
        for name, module in plan.model.named_modules()
        if isinstance(module, LoraLayer)
    }


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}


def test_all_linear_has_the_shared_experts_where_their_names_are_not_those_of_experts(models):
    shared = {f"shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    dense = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    wanted = ATTENTION | shared | dense | {"mlp.shared_expert_gate"}
    assert adapted(models("qwen2_moe")) == wanted


GLM = {
    f"{part}.{name}_proj" for part in ("mlp", "shared_experts") for name in ("gate", "up", "down")
}


def test_all_linear_has_dense_layers_and_shared_experts_whatever_peft_takes_their_names_for(models):
    assert adapted(models("glm4_moe")) == ATTENTION | GLM
    assert adapted(models("glm4_moe"), exclude_modules=["mlp.up_proj"]) == ATTENTION | GLM - {
        "mlp.up_proj"
    }


def test_dora_says_what_it_leaves_out_of_all_linear(models, caplog):
    with caplog.at_level(logging.INFO, "headrace"):
        assert adapted(models("glm4_moe"), kind="dora") == ATTENTION
    assert "layers.0.mlp.gate_proj" in caplog.text
    assert "12 linear layers have no adapter" in caplog.text


def test_all_linear_leaves_out_a_router_that_is_a_linear_layer(models):
    assert adapted(models("phimoe")) == ATTENTION
    assert adapted(models("phimoe"), layers="1:2") == ATTENTION


def test_a_router_as_target_is_refused_by_name(models):
    with pytest.raises(ConfigError, match='"router" is a PhimoeTopKRouter'):
        adapted(models("phimoe"), target_modules=["q_proj", "router"])


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_modules": ["q_proj", "gate_porj"]}, '"gate_porj" matches nothing'),
        ({"target_modules": ["q_proj", "gate_porj"]}, 'did you mean "gate_proj"?'),
        ({"target_modules": ["w1", "q_proj", "w2"]}, '"w1", "w2" matches nothing'),
        ({"kind": "none", "target_modules": ["self_attn", "nrom"]}, '"nrom" matches nothing'),
        ({"kind": "none", "target_modules": []}, "nothing is left to train"),
    ],
)
def test_a_target_that_matches_nothing_is_named_beside_others_that_do(models, adapter, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_model(config_of(models("llama"), 1, adapter))


@pytest.mark.parametrize("adapter", [{"kind": "none"}, {"modules_to_save": ["moe_statics"]}])
def test_what_transformers_freezes_stays_frozen(models, adapter):
    names = {
        name: parameter.requires_grad
        for name, parameter in plan_model(
            config_of(models("ernie4_5_moe"), 1, adapter)
        ).model.named_parameters()
        if "e_score_correction_bias" in name
    }
    assert names
    assert not any(names.values())


def test_a_frozen_parameter_in_full_fine_tuning_changes_no_gradient(models):
    directory, batch = models("ernie4_5_moe"), make_batch()
    built = build(config_of(directory, 2, router_loss=0.0))
    run_stages(built, batch)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    loss, _ = reference_loss(model, batch)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    mine = gradients_of(built)
    assert mine.keys() == expected.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_a_router_trained_in_full_beside_adapters_keeps_its_loss_and_merges(models, tmp_path):
    directory, batch = models("mixtral"), make_batch()
    built = build(config_of(directory, 1, {"rank": 2, "modules_to_save": ["gate"]}))
    before = run_stages(built, batch)
    plain = build(config_of(directory, 1, {"rank": 2}))
    assert before[2] == pytest.approx(run_stages(plain, batch)[2])
    routers = [name for name in gradients_of(built) if ".gate." in name]
    assert len(routers) == 4
    with torch.no_grad():
        for item in built[0].trained:
            if item.name in routers:
                item.parameter.add_(0.1)
    (tmp_path / "adapter").mkdir()
    tensors = adapter_tensors(built[0], torch.float32)
    built[0].method.write(tmp_path / "adapter", tensors, 1, directory)
    merge(directory, tmp_path / "adapter", tmp_path / "merged")
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    base = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    name = "model.layers.2.mlp.gate.weight"
    torch.testing.assert_close(changed[name], base[name] + 0.1)
