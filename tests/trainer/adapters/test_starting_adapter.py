"""Training starts from an adapter that PEFT has written, with PEFT's own loss of it."""

import json
import re

import pytest
import torch
from other_mixtures import OTHERS, save_other
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from saved_parts import saved_adapter
from tiny_families import build, config_of, make_batch, reference_loss, run_stages, save_tiny
from transformers import AutoModelForCausalLM

from headrace.schemas.errors import ConfigError, DataError
from headrace.trainer.building.self_check import plan_model

FAMILIES = ("llama", "mistral", "qwen3_moe", "glm4_moe")
PATTERNS = {"rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {"q_proj": 3}}
CASES = {
    "lora": ("mistral", {"target_modules": ["q_proj", "down_proj"], **PATTERNS}),
    "rslora, an expression": (
        "mistral",
        {
            "target_modules": r".*layers\.[02]\..*",
            "exclude_modules": r".*(norm|mlp|self_attn|act_fn)",
            "use_rslora": True,
            "lora_dropout": 0.1,
        },
    ),
    "dora": ("mistral", {"target_modules": "all-linear", "use_dora": True}),
    "layers": ("mistral", {"target_modules": ["v_proj"], "layers_to_transform": [1, 3]}),
    "whole modules": ("mistral", {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "whole modules, tied": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "embedding": ("mistral", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, tied": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": ("mistral", {"target_modules": ["embed_tokens", "lm_head"]}),
    "experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    ),
    "experts by old names": ("qwen3_moe", {"target_modules": ["gate_proj", "up_proj", "q_proj"]}),
    "shared experts": (
        "glm4_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["shared_experts.up_proj.weight"],
            "rank_pattern": {"up_proj.weight": 6},
        },
    ),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(tie_word_embeddings|tied|save_embedding_layers|_pattern keys).*"
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("started")
    for family in FAMILIES:
        (save_other if family in OTHERS else save_tiny)(family, folder / family)
    return folder


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def theirs(model, directory, **settings):
    """An adapter that PEFT has made and saved, all of it changed."""
    settings = {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8, **settings}
    wrapped = get_peft_model(load(model), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(directory)
    return directory


def started(model, adapter, stages=1, **settings):
    settings = {"adapter": {"path": str(adapter)}, "router_loss": 0.0, **settings}
    return build(config_of(model, stages, **settings))


def loss_of(built):
    for part in built:
        part.stage.eval()
    return run_stages(built, make_batch())[0]


@pytest.mark.parametrize("case", CASES)
def test_the_first_loss_is_that_of_peft_with_the_adapter_and_what_is_saved_is_the_same(
    models, tmp_path, case
):
    family, settings = CASES[case]
    adapter = theirs(models / family, tmp_path / "theirs", **settings)
    reference = PeftModel.from_pretrained(load(models / family), adapter).eval()
    expected = reference_loss(reference, make_batch())[0].item()
    built = started(models / family, adapter, 2)
    assert loss_of(built) == pytest.approx(expected, rel=1e-6)
    assert loss_of(started(models / family, adapter)) == pytest.approx(expected, rel=1e-6)
    plain = reference_loss(load(models / family), make_batch())[0].item()
    assert abs(plain - expected) > 1e-3
    again = saved_adapter(built, tmp_path / "ours")
    reloaded = PeftModel.from_pretrained(load(models / family), again).eval()
    assert reference_loss(reloaded, make_batch())[0].item() == pytest.approx(expected, rel=1e-6)
    trained = {name: p for name, p in reference.named_parameters() if "lora_" in name}
    values = dict(reloaded.named_parameters())
    assert trained and all(torch.equal(values[name], p) for name, p in trained.items())


def test_settings_come_from_the_adapters_config_and_others_are_refused_with_both(models, tmp_path):
    settings = CASES["lora"][1] | {"layers_to_transform": [0, 1, 2]}
    adapter = theirs(models / "mistral", tmp_path / "theirs", **settings)
    config = config_of(models / "mistral", 1, {"path": str(adapter)}).adapter
    assert (config.rank, config.alpha, config.layers) == (4, 8.0, "0,1,2")
    assert config.rank_pattern == PATTERNS["rank_pattern"]
    assert sorted(config.target_modules) == ["down_proj", "q_proj"]
    same = {"rank": 4, "layers": "0:2", "target_modules": ["q_proj", "down_proj"], "dropout": 0.1}
    assert config_of(models / "mistral", 1, {"path": str(adapter), **same}).adapter.dropout == 0.1
    for key, value, found in (("rank", 16, 4), ("alpha", 4.0, 8.0), ("kind", "dora", "'lora'")):
        with pytest.raises(ValueError, match=rf"{key} = .*{value}.*, but .*json has {found}"):
            config_of(models / "mistral", 1, {"path": str(adapter), key: value})
    with pytest.raises(ValueError, match=r"init = .* has no meaning with path"):
        config_of(models / "mistral", 1, {"path": str(adapter), "init": "pissa"})
    with pytest.raises(ValueError, match=r"adapter_config.json: not found"):
        config_of(models / "mistral", 1, {"path": str(tmp_path)})


def renamed(name):
    return name.replace("layers.1", "layers.7")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {renamed(k): v for k, v in t.items()},
            "no tensor base_model.model.model.layers.1",
        ),
        (
            lambda t: t | {renamed(k): v.clone() for k, v in t.items()},
            "no place for its tensor base_model",
        ),
        (
            lambda t: {k: v[:1].contiguous() for k, v in t.items()},
            r"has shape \[1, 32\], the model",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(models, tmp_path, change, message):
    adapter = theirs(models / "mistral", tmp_path / "theirs")
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(DataError, match=message):
        started(models / "mistral", adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3 cannot be started from"),
        ({"bias": "all"}, "bias = all: trained biases are not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa: the adapter belongs"),
        ({"target_modules": "(a+)+$"}, "matches no module"),
        ({"lora_alpha": "x"}, "lora_alpha is a string, not a number"),
    ],
)
def test_what_cannot_be_started_from_is_refused_by_name(models, tmp_path, change, message):
    adapter = theirs(models / "mistral", tmp_path / "theirs")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((ConfigError, ValueError), match=re.escape(message)):
        plan_model(config_of(models / "mistral", 1, {"path": str(adapter)}))


def test_an_adapter_goes_on_over_quantized_weights_in_stages(models, tmp_path):
    adapter = theirs(models / "glm4_moe", tmp_path / "theirs", **CASES["shared experts"][1])
    quantization = {"backend": "bnb", "double_quantization": False}
    losses = [
        loss_of(started(models / "glm4_moe", adapter, stages, quantization=quantization))
        for stages in (1, 2)
    ]
    assert losses[0] == losses[1]
