"""Targets, ranks and scales by expressions: PEFT's own adapters of the same config."""

import re
from pathlib import Path

import pytest
import torch
from other_mixtures import OTHERS, save_other
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from saved_parts import saved_adapter, step
from tiny_families import (
    build,
    config_of,
    make_batch,
    reference_loss,
    run_stages,
    save_tiny,
)
from transformers import AutoModelForCausalLM

from headrace.schemas.errors import ConfigError
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.export.merge import merge

MLP = r".*layers\.[01]\.mlp\..*_proj"
# [adapter] of ours -> the same in PEFT's words
CONFIGS = [
    ({"target_modules": MLP}, {"target_modules": MLP}),
    (
        {"target_modules": MLP, "exclude_modules": r".*up_proj"},
        {"target_modules": MLP, "exclude_modules": r".*up_proj"},
    ),
    (
        {"target_modules": ["q_proj", "v_proj"], "layers": "1:2", "alpha": 8.0},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2], "lora_alpha": 8.0},
    ),
    (
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 8, r"layers\.0\..*": 2},
            "alpha_pattern": {r"layers\.[0-9]\.self_attn\.q_proj": 3.0},
            "rslora": True,
        },
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 8, r"layers\.0\..*": 2},
            "alpha_pattern": {r"layers\.[0-9]\.self_attn\.q_proj": 3.0},
            "use_rslora": True,
        },
    ),
    (
        {"rank_pattern": {"embed_tokens": 3}, "target_modules": ["embed_tokens", "k_proj"]},
        {"rank_pattern": {"embed_tokens": 3}, "target_modules": ["embed_tokens", "k_proj"]},
    ),
    (
        {"exclude_modules": ["o_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    ),
]


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return save_tiny("mistral", tmp_path_factory.mktemp("patterns") / "mistral")


def adapters_of(model):
    """Names, ranks, scales and shapes of all adapters."""
    return {
        name: (
            module.r["default"],
            module.scaling["default"],
            sorted(tuple(p.shape) for n, p in module.named_parameters() if "lora_" in n),
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize(("ours", "theirs"), CONFIGS)
def test_adapters_are_those_of_peft_with_the_same_config(mistral, ours, theirs):
    plan = plan_model(config_of(mistral, 1, {"rank": 4, **ours}))
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **{"lora_alpha": 4, **theirs})
    expected = get_peft_model(AutoModelForCausalLM.from_pretrained(mistral), config)
    assert adapters_of(plan.model) == adapters_of(expected)
    assert adapters_of(expected)


PATTERNS = {"rank_pattern": {"down_proj": 8, "gate_proj": 6}, "alpha_pattern": {"q_proj": 2.0}}


@pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match any targeted module.*")
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", PATTERNS),
        ("glm4_moe", PATTERNS),
        ("glm4_moe", {"target_modules": r".*layers\.[02]\..*(down|q)_proj", "dropout": 0.1}),
    ],
)
def test_what_is_saved_loads_in_peft_with_the_trainers_loss_and_merges(tmp_path, family, settings):
    directory = tmp_path / "model"
    save_other(family, directory) if family in OTHERS else save_tiny(family, directory)
    built = build(config_of(directory, 2, {"rank": 4, **settings}, router_loss=0.0))
    step(built)
    for part in built:
        part.stage.eval()
    loss, _, _ = run_stages(built, make_batch())
    adapter = saved_adapter(built, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, adapter).eval()
    assert len(adapters_of(theirs)) == sum(len(list(part.trained)) // 2 for part in built)
    merge(directory, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    for model in (theirs, merged):
        assert reference_loss(model, make_batch())[0].item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_modules": "q_proj"}, 'target_modules: "q_proj" matches no module; an expression'),
        ({"target_modules": "("}, "target_modules: '(' is not a regular expression"),
        ({"rank_pattern": {"q_porj": 2}}, 'rank_pattern: "q_porj" matches no module'),
        ({"alpha_pattern": {"layers.9": 2.0}}, 'alpha_pattern: "layers.9" matches no module'),
        ({"exclude_modules": ["q_porj"]}, '"q_porj" matches nothing'),
        ({"exclude_modules": "q_proj"}, 'exclude_modules: "q_proj" matches no module'),
        ({"target_modules": r".*\.mlp"}, "mlp"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(mistral, adapter, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_model(config_of(mistral, 1, adapter))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_modules": ".*q_proj", "layers": "0:1"}, "does not go with a regular expression"),
        ({"kind": "none", "target_modules": ".*q_proj"}, "give a list of names"),
        ({"kind": "none", "rank_pattern": {"q_proj": 2}}, "rank_pattern has no meaning"),
        ({"kind": "control", "exclude_modules": ["q_proj"]}, "exclude_modules has no meaning"),
    ],
)
def test_a_pattern_without_a_meaning_is_refused(adapter, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(Path("model"), 1, adapter)


LARGE = "above the smaller dimension of"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"rank": 100_000}, f"adapter.rank: rank 100000 is {LARGE} its largest weight, 32 of"),
        ({"rank": 4, "rank_pattern": {"q_proj": 33}}, f"adapter.rank_pattern: rank 33 is {LARGE}"),
        ({"rank": 32, "init": "pissa"}, f"rank 32 is {LARGE} a weight it takes a part of, 16 of"),
        ({"kind": "control", "rank": 33}, "33 directions cannot be orthonormal"),
    ],
)
def test_a_rank_above_the_dimensions_of_its_weights_is_refused(mistral, adapter, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_model(config_of(mistral, 1, adapter))


def test_a_rank_that_some_of_its_weights_have_is_taken(mistral):
    plan = plan_model(config_of(mistral, 1, {"rank": 32}))
    layers = [part for part in plan.model.modules() if isinstance(part, LoraLayer)]
    assert {layer.r["default"] for layer in layers} == {32}
    assert min(layer.out_features for layer in layers) < 32
