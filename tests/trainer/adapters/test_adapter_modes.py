"""Every way to train: the same in one stage and in two, and loaded by PEFT with the same loss."""

import re

import pytest
import torch
from runs import checkpoint_tensors, exact_metrics
from saved_parts import saved_adapter, saved_model, step
from tiny_families import (
    build,
    config_of,
    gradients_of,
    make_batch,
    reference_loss,
    run_forward,
    run_stages,
    save_tiny,
)
from transformers import AutoModelForCausalLM

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.optimizer_config import OptimizerConfig
from headrace.trainer.building.materializer import TrainedParameter
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.export.merge import merge
from headrace.trainer.optim.optimizer import build_optimizer, set_learning_rate

MODES = {
    "lora": {},
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "layers": {"layers": "0:1,3"},
    "last layer only": {"layers": "3"},
    "rslora": {"rslora": True, "alpha": 3.0},
    "gaussian": {"init": "gaussian"},
    "dora": {"kind": "dora"},
    "dora on embedding and head": {
        "kind": "dora",
        "target_modules": ["embed_tokens", "lm_head", "v_proj"],
    },
    "pissa": {"init": "pissa", "alpha": 2.0},
    "pissa, rslora": {"init": "pissa", "rslora": True},
    "olora": {"init": "olora"},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "embedding and norms saved whole": {"modules_to_save": ["embed_tokens", "input_layernorm"]},
    "dropout": {"dropout": 0.2, "target_modules": ["q_proj", "lm_head"]},
}
EXPERT_MODES = {
    "experts": {"target_parameters": "experts"},
    "one kind": {"target_parameters": ["mlp.experts.down_proj"], "layers": "1:2"},
    "router": {"target_parameters": ["mlp.gate.weight", "mlp.experts.gate_up_proj"]},
}
FULL_MODES = {
    "all": {},
    "parts": {"target_modules": ["self_attn", "norm"]},
    "layers": {"layers": "2:3"},
    "head": {"target_modules": ["lm_head"]},
    "blocks": {"kind": "blocks", "blocks": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory, made = tmp_path_factory.mktemp("modes"), {}

    def get(family, **changes):
        name = "-".join([family, *(f"{key}-{value}" for key, value in changes.items())])
        if name not in made:
            made[name] = save_tiny(family, directory / name, **changes)
        return made[name]

    return get


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def evaluate(built, batch):
    """Loss per trained token, without dropout and without the routers' loss."""
    for part in built:
        part.stage.eval()
    with torch.no_grad():
        outputs = run_forward(built, batch)
    return outputs[-1].token_losses.sum().item() / batch.trained_tokens


def same_in_two_stages(directory, adapter, **settings):
    """Train a step in one stage and in two; returns the two, after comparing all bits."""
    batch, blocks = make_batch(), adapter["kind"] == "blocks"
    one = build(config_of(directory, 1, adapter, **settings))
    two = build(config_of(directory, 2, adapter, **settings))
    for built in (one, two):
        for part in built:
            part.stage.train()
    first, second = run_stages(one, batch, seed=3), run_stages(two, batch, seed=3)
    assert torch.equal(first[1], second[1])
    mine, theirs = gradients_of(one), gradients_of(two)
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        assert torch.equal(gradient, theirs[name]), name
        assert gradient.any() or "lora_" in name or blocks, f"{name} is not trained"
    assert any(gradient.any() for gradient in mine.values())
    return one, two


def peft_loss(directory, adapter, batch):
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        loss, _ = reference_loss(model, batch)
    return float(loss)


def stored_loss(directory, batch):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        loss, _ = reference_loss(model, batch)
    return float(loss)


def check_adapter(directory, adapter, tmp_path):
    batch = make_batch()
    before = stored_loss(directory, batch)
    one, two = same_in_two_stages(directory, {"rank": 4, "kind": "lora", **adapter})
    if adapter.get("dropout", 0) == 0:
        assert evaluate(one, batch) == pytest.approx(before, rel=1e-5)
    step(two)
    after = evaluate(two, batch)
    assert abs(after - before) > 1e-3, "the adapter does too little to be compared"
    saved = saved_adapter(two, tmp_path / "adapter")
    assert peft_loss(directory, saved, batch) == pytest.approx(after, rel=1e-5)
    merge(directory, saved, tmp_path / "merged")
    assert stored_loss(tmp_path / "merged", batch) == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("name", MODES)
def test_an_adapter_is_the_same_in_two_stages_and_reloads(models, name, tmp_path):
    check_adapter(models("llama", tie_word_embeddings=False), MODES[name], tmp_path)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("name", ["lora", "embedding and head", "head saved whole"])
def test_so_it_is_over_tied_embeddings(models, name, tmp_path):
    check_adapter(models("llama"), MODES[name], tmp_path)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("name", ["embedding and head", "embedding and norms saved whole"])
def test_so_it_is_where_the_embedding_is_scaled_and_logits_are_capped(models, name, tmp_path):
    check_adapter(models("gemma2"), MODES[name], tmp_path)


@pytest.mark.parametrize("name", EXPERT_MODES)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_so_it_is_on_fused_experts(models, family, name, tmp_path):
    check_adapter(models(family), EXPERT_MODES[name], tmp_path)


@pytest.mark.parametrize("name", FULL_MODES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_trained_weights_are_the_same_in_two_stages_and_reload(models, name, tied, tmp_path):
    directory, batch = models("llama", tie_word_embeddings=tied), make_batch()
    before = stored_loss(directory, batch)
    one, two = same_in_two_stages(directory, {"kind": "none", **FULL_MODES[name]})
    assert evaluate(one, batch) == pytest.approx(before, rel=1e-5)
    step(two)
    after = evaluate(two, batch)
    assert abs(after - before) > 1e-3
    saved = saved_model(two, directory, tmp_path / "model")
    assert stored_loss(saved, batch) == pytest.approx(after, rel=1e-5)
    trained = {item.name: item.parameter for part in two for item in part.trained}
    reloaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).state_dict()
    assert all(torch.equal(reloaded[name], value) for name, value in trained.items())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_saved_mixture_has_the_names_of_the_hub(models, family, tmp_path):
    from safetensors.torch import load_file

    directory, batch = models(family), make_batch()
    two = build(config_of(directory, 2))
    step(two)
    after = evaluate(two, batch)
    saved = saved_model(two, directory, tmp_path / "model")
    names = {name for file in saved.glob("*.safetensors") for name in load_file(file)}
    assert names == {name for file in directory.glob("*.safetensors") for name in load_file(file)}
    assert stored_loss(saved, batch) == pytest.approx(after, rel=1e-5)


@pytest.mark.slow
def test_stages_without_anything_to_train_run_and_save(training):
    """Only the last layer has adapters, at a higher rate for B; the first stage has none."""
    settings = {"max_steps": 3, "adapter__layers": "4", "optimizer__lora_plus_ratio": 4.0}
    settings["checkpoint__every_steps"] = 2
    one = training.run("one", 1, **settings)
    two = training.run("two", 2, pipeline_stages=2, **settings)
    assert exact_metrics(two) == exact_metrics(one)
    reference, tensors = checkpoint_tensors(one), checkpoint_tensors(two)
    assert tensors.keys() == reference.keys()
    assert all(".layers.4." in name for name in tensors)
    assert all(torch.equal(tensors[name], reference[name]) for name in reference)


def test_with_lora_plus_the_adapters_up_projection_has_its_own_rate():
    names = ("q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight", "norm.weight")
    shapes = ((2, 3), (3, 2), (3,))
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    trained = [TrainedParameter(n, p, owned=True) for n, p in zip(names, parameters, strict=True)]
    config = OptimizerConfig(lr=1.0, lora_plus_ratio=8.0, weight_decay=0.0)
    optimizer = build_optimizer(config, trained)
    set_learning_rate(optimizer, 0.5)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    steps = [parameter.abs().max().item() for parameter in parameters]
    assert steps == pytest.approx([0.5, 4.0, 0.5], rel=1e-4)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_parameters": ["mlp.experts.w1"]}, 'no weight is called "mlp.experts.w1"'),
        ({"target_parameters": "experts"}, "the model has no fused experts"),
        ({"modules_to_save": ["score"]}, 'no module is called "score"'),
        ({"layers": "2:4"}, 'adapter.layers = "2:4": the model has layers 0 to 3'),
        (
            {"kind": "none", "target_modules": ["router"]},
            '"router" matches nothing that is trained',
        ),
        ({"init": "pissa", "target_modules": ["lm_head"]}, "the head is tied to the embedding"),
        ({"kind": "blocks", "blocks": 5}, "adapter.blocks = 5: the model has 4 layers"),
    ],
)
def test_what_the_model_does_not_have_is_named(models, adapter, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_model(config_of(models("llama"), 1, adapter))
