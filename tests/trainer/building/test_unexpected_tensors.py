"""Tensors in a checkpoint's files that its model does not call for, or cannot compute with."""

import logging
import shutil

import pytest
import torch
from other_mixtures import save_other
from safetensors.torch import load_file, save_file
from saved_parts import saved_adapter, step
from tiny_families import build, config_of, save_tiny
from transformers import AutoModelForCausalLM

from headrace.schemas.errors import DataError
from headrace.trainer.export.merge import merge

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("unexpected") / "llama")


def with_tensors(model, folder, **changes):
    """A copy of a model with further tensors; a type in place of one changes that of the stored."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        given = isinstance(value, torch.Tensor)
        tensors[name] = value.clone() if given else tensors[name].to(value)
    save_file(tensors, file, {"format": "pt"})
    return folder


def told(caplog, model):
    with caplog.at_level(logging.INFO, "headrace"):
        built = build(config_of(model, 2, {"rank": 2}))
    return built, [text for text in caplog.messages if "are not in the model" in text]


def test_tensors_that_the_model_does_not_call_for_are_named_once(llama, tmp_path, caplog):
    further = {f"{Q}.bias": torch.ones(32)}
    further |= {f"model.layers.{layer}.extra.weight": torch.ones(2) for layer in range(3)}
    model = with_tensors(llama, tmp_path / "model", **further)
    built, messages = told(caplog, model)
    total = len(load_file(model / "model.safetensors"))
    (message,) = messages
    assert f"{model}: 4 of {total} tensors are not in the model" in message
    assert "model.layers.0.extra.weight" in message
    assert message.endswith(", ...")
    step(built)
    adapter = saved_adapter(built, tmp_path / "adapter")
    caplog.clear()
    with caplog.at_level(logging.INFO, "headrace"):
        merge(model, adapter, tmp_path / "merged")
    assert f"4 of {total} tensors are not in the model" in caplog.text
    _, loading = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert set(loading["unexpected_keys"]) == further.keys()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "mtp.layers.0.mlp.up_proj.weight",
        "model.mtp_layers.0.norm.weight",
    ],
)
def test_what_checkpoints_are_known_to_have_beside_is_no_news(llama, tmp_path, caplog, name):
    model = with_tensors(llama, tmp_path / "model", **{name: torch.ones(4)})
    assert told(caplog, model)[1] == []


def test_what_transformers_passes_over_is_no_news(tmp_path, caplog):
    glm = save_other("glm4_moe", tmp_path / "glm")
    known, other = "model.layers.92.norm.weight", "model.layers.93.norm.weight"
    model = with_tensors(glm, tmp_path / "model", **{known: torch.ones(4), other: torch.ones(4)})
    ((message),) = told(caplog, model)[1]
    assert other in message and known not in message


def test_other_parts_of_a_multimodal_checkpoint_are_no_news(llama, tmp_path, caplog):
    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = {
        name.replace("model.", "model.language_model.", 1): value
        for name, value in load_file(file).items()
    }
    tensors["model.visual.patch_embed.weight"] = torch.ones(4)
    save_file(tensors, file, {"format": "pt"})
    assert told(caplog, tmp_path / "model")[1] == []
    save_file(tensors | {"model.language_model.odd": torch.ones(4)}, file, {"format": "pt"})
    assert "model.language_model.odd" in told(caplog, tmp_path / "model")[1][0]


@pytest.mark.parametrize("kind", [torch.int64, torch.int16, torch.bool, torch.int32])
def test_integers_in_place_of_weights_are_refused_by_name(llama, tmp_path, kind):
    model = with_tensors(llama, tmp_path / "model", **{f"{Q}.weight": kind})
    with pytest.raises(DataError, match=f"{Q}.weight holds .* without the scales"):
        build(config_of(model, 1, {"rank": 2}))
