"""A process reads its own stage's weights, once, whatever they are called in the files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_families import (
    COMMON,
    build,
    config_of,
    gradients_of,
    make_batch,
    reference_loss,
    run_forward,
    run_stages,
    save_tiny,
)
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.schemas.errors import ConfigError, DataError
from headrace.trainer.architecture import read_architecture
from headrace.trainer.architecture.families import FAMILIES
from headrace.trainer.architecture.weights import WeightFiles
from headrace.trainer.building import self_check
from headrace.trainer.building.self_check import plan_model

STAGES = 4


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def losses_of(built, batch):
    with torch.no_grad():
        return run_forward(built, batch)[-1].token_losses


def stored_names(directory):
    names = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def loading_costs(directory, *kinds):
    """What `support/loading_cost.py` measures, by kind and stage."""
    script = Path(__file__).parents[2] / "support" / "loading_cost.py"
    paths = {"PYTHONPATH": str(Path(__file__).parents[3])}  # of the tests
    done = subprocess.run(
        [sys.executable, str(script), str(directory), str(STAGES), *kinds],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        # what is freed does not count
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"} | paths,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(len(stages) == STAGES for stages in found.values())
    return found


@pytest.mark.parametrize(
    "backends", [["bnb"], pytest.param(["hqq"], marks=pytest.mark.exhaustive)], ids=["bnb", "hqq"]
)
def test_each_stage_reads_its_share_of_the_bytes_and_holds_little_more(backends, tmp_path):
    """In a process of its own, since peaks of memory are those of processes; as it is stored, and
    quantized.
    """
    costs = loading_costs(tmp_path / "model", *backends)
    assert list(costs) == ["none", *backends]
    for backend, stages in costs.items():
        for cost in stages:
            share = cost["share_bytes"]
            assert share > 50 << 20, "too little to be measured"
            assert cost["read"] <= 1.15 * share
            assert cost["peak"] <= cost["stage_bytes"] + cost["largest_layer"]
            assert cost["stage_bytes"] < (1.1 if backend == "none" else 0.6) * share
        assert sum(cost["read"] for cost in stages) <= 1.15 * stages[0]["file_bytes"]


@pytest.mark.exhaustive
def test_so_does_each_stage_of_a_model_whose_files_are_quantized(tmp_path):
    costs = loading_costs(tmp_path / "model", "packed")
    assert list(costs) == ["fp8", "fp8 in 4 bits", "mxfp4"]
    for kind, stages in costs.items():
        for cost in stages:
            assert cost["read"] <= (0.7 if "fp8" in kind else 0.4) * cost["share_bytes"]
            assert cost["peak"] <= cost["stage_bytes"] + cost["largest_layer"]
        assert sum(cost["read"] for cost in stages) <= 1.15 * stages[0]["file_bytes"]


def test_experts_that_are_stored_one_by_one_are_fused(tmp_path):
    directory = save_tiny("mixtral", tmp_path / "model")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in stored_names(directory)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for part in build(config_of(directory, 2)):
        for item in part.trained:
            assert torch.equal(item.parameter, reference.get_parameter(item.name)), item.name


MULTIMODAL = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"sliding_window": 5, "head_dim": 8, "query_pre_attn_scalar": 8},
        "gemma3_text",
    ),
    "mistral3": ("Mistral3ForConditionalGeneration", {"sliding_window": None}, "mistral"),
}


@pytest.mark.parametrize("stored_first", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_text_part_of_a_multimodal_checkpoint_is_read(kind, stored_first, tmp_path):
    import transformers
    from safetensors.torch import load_file, save_file

    name, changes, text_type = MULTIMODAL[kind]
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 8}
    config = transformers.CONFIG_MAPPING[kind](
        text_config={**COMMON, **changes, "model_type": text_type},
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    directory = tmp_path / "model"
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    as_new = {
        key.replace("language_model.model.", "model.language_model."): value
        for key, value in tensors.items()
    }
    if stored_first.startswith("model."):
        save_file(as_new, directory / "model.safetensors", metadata={"format": "pt"})
    assert any(key.startswith(stored_first) for key in stored_names(directory))

    batch = make_batch()
    built = build(config_of(directory, 2))
    with torch.no_grad():
        expected, _ = reference_loss(model, batch)
    loss = losses_of(built, batch).sum() / batch.trained_tokens
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_random_weights_need_a_config_alone_and_are_the_same_for_any_cut(tmp_path):
    directory = save_tiny("gemma2", tmp_path / "model")
    for file in directory.glob("*.safetensors"):
        file.unlink()
    batch = make_batch()
    one = build(config_of(directory, 1, weights="random"))
    three = build(config_of(directory, 3, weights="random"))
    assert torch.equal(losses_of(one, batch), losses_of(three, batch))
    values = {item.name: item.parameter for part in three for item in part.trained}
    matrix = values["model.layers.2.mlp.up_proj.weight"]
    assert matrix.std().item() == pytest.approx(COMMON["initializer_range"], rel=0.1)
    assert not values["model.norm.weight"].any(), "gemma's norms are centered on 0"
    other = build(config_of(directory, 1, weights="random", seed=1))
    assert not torch.equal(losses_of(one, batch), losses_of(other, batch))


def test_weights_are_of_the_type_that_is_asked_for(tmp_path):
    directory = save_tiny("llama", tmp_path / "model")
    built = build(config_of(directory, 2, {"kind": "lora", "rank": 2}, dtype="bfloat16"))
    for part in built:
        for name, parameter in part.stage.canonical_parameters().items():
            wanted = torch.float32 if ".lora_" in name else torch.bfloat16
            assert parameter.dtype == wanted, name


def test_a_file_that_ends_early_is_named(tmp_path):
    directory = save_tiny("llama", tmp_path / "model")
    with WeightFiles(directory) as files:
        with (directory / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
        name = max(files.tensors, key=lambda key: files.tensors[key].offset)
        with pytest.raises(DataError, match="ends early"):
            list(files.read_groups([[name]]))


def test_an_unknown_family_that_fits_is_trained_after_a_trial(tmp_path):
    config = AutoConfig.for_model("stablelm", **COMMON, partial_rotary_factor=0.5)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    batch = make_batch()
    built = build(config_of(tmp_path / "model", 3))
    loss, _, _ = run_stages(built, batch)
    expected, _ = reference_loss(model, batch)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients_of(built).items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_a_family_whose_forward_pass_differs_is_found_out(tmp_path, monkeypatch):
    """granite scales its embedding; without record and key nothing says so."""
    directory = save_tiny("granite", tmp_path / "model")
    unlisted = {name: family for name, family in FAMILIES.items() if name != "granite"}
    monkeypatch.setattr(read_architecture, "FAMILIES", unlisted)
    monkeypatch.setattr(self_check, "FAMILIES", unlisted)
    plan_model(config_of(directory))
    monkeypatch.setattr(read_architecture, "SCALES", {})
    with pytest.raises(ConfigError, match=r"losses are off from transformers' .* supported: coh"):
        plan_model(config_of(directory))


@pytest.mark.parametrize("model_type", ["llama", "strange"])
def test_code_in_a_model_directory_is_never_run(tmp_path, monkeypatch, model_type):
    directory, ran = save_tiny("llama", tmp_path / "model"), tmp_path / "ran"
    (directory / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    config = json.loads((directory / "config.json").read_text()) | {"model_type": model_type}
    config["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (directory / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    if model_type == "llama":
        plan_model(config_of(directory, 1))
    else:
        with pytest.raises(ConfigError, match="its code lies in its directory"):
            plan_model(config_of(directory, 1))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (
            "bert",
            {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
            "no place for its part bert.embeddings",
        ),
        (
            "electra",
            {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
            "no place for its part electra.embeddings",
        ),
    ],
)
def test_a_family_that_does_not_fit_is_refused_before_weights_are_read(
    kind, changes, reason, tmp_path
):
    AutoConfig.for_model(kind, **changes).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        plan_model(config_of(tmp_path))
    assert f'{tmp_path}: model_type "{kind}" is not supported: ' in str(caught.value)
    assert reason in str(caught.value)
