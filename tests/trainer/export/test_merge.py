"""Merging: a scale, a count, and a line for what cannot be merged."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from saved_parts import adapter_of
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.schemas.errors import CheckpointError, ConfigError, DataError
from headrace.trainer.export import merged_model
from headrace.trainer.export.convert import find_checkpoint
from headrace.trainer.export.merge import merge


def weights(directory):
    return {k: t for f in directory.glob("*.safetensors") for k, t in load_file(f).items()}


def test_the_change_is_scaled_and_what_is_taken_away_again_is_gone(tiny_model, tmp_path):
    adapter = adapter_of(tiny_model, tmp_path / "adapter")
    assert merge(tiny_model, adapter, tmp_path / "whole") == 5
    (adapter / "README.md").write_text("# mine\n")
    merge(tiny_model, adapter, tmp_path / "half", scale=0.5)
    assert "scale of 0.5" in (tmp_path / "half" / "README.md").read_text()
    merge(tmp_path / "whole", adapter, tmp_path / "back", scale=-1)
    base, whole, half, back = (
        weights(path)
        for path in (tiny_model, tmp_path / "whole", tmp_path / "half", tmp_path / "back")
    )
    changed = [name for name in base if not torch.equal(base[name], whole[name])]
    assert changed == [name for name in base if "q_proj" in name] and len(changed) == 5
    for name in changed:
        torch.testing.assert_close(half[name] - base[name], 0.5 * (whole[name] - base[name]))
        torch.testing.assert_close(back[name], base[name], atol=1e-6, rtol=1e-5)


def test_an_adapter_of_other_names_is_refused_instead_of_merging_nothing(tiny_model, tmp_path):
    """qlora-pipe-lite's bug 3.2.2: keys that matched nothing, no count, an unchanged model."""
    adapter = adapter_of(tiny_model, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    renamed = {
        n.replace("model.model.layers", "model.layers"): t for n, t in load_file(file).items()
    }
    save_file(renamed, file)
    with pytest.raises(DataError, match=r"no tensor base_model\.model\.model\.layers\.0"):
        merge(tiny_model, adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "nothing is left behind"


@pytest.mark.parametrize("damage", [b"", b"no tensors at all"])
def test_a_damaged_adapter_is_named_in_one_line(damage, tiny_model, tmp_path):
    adapter = adapter_of(tiny_model, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(damage)
    with pytest.raises(DataError, match=r"adapter_model\.safetensors: cannot be read"):
        merge(tiny_model, adapter, tmp_path / "merged")


def test_changing_no_weight_is_an_error(tiny_model, tmp_path, monkeypatch):
    adapter = adapter_of(tiny_model, tmp_path / "adapter")
    monkeypatch.setattr(merged_model, "scale_and_count", lambda *_: 0)
    with pytest.raises(DataError, match="none of its tensors changes a weight of"):
        merge(tiny_model, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dora"}, "DoRA adapters"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"trainable_token_indices": [3]}, "rows"),
    ],
)
def test_what_cannot_be_scaled_is_merged_only_as_it_is(tiny_model, tmp_path, settings, message):
    """qlora-pipe's bug 3.1.12: DoRA and modules_to_save ended in a bare RuntimeError."""
    adapter = adapter_of(tiny_model, tmp_path / "adapter", **settings)
    with pytest.raises(ConfigError, match=f"--scale 2: {message} cannot be scaled"):
        merge(tiny_model, adapter, tmp_path / "merged", scale=2)
    assert merge(tiny_model, adapter, tmp_path / "merged") >= 5


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("control_adapter.json", "control adapters change what layers add"),
        ("config.json", "holds a whole model already"),
        ("other.json", r"no adapter_config\.json"),
    ],
)
def test_what_is_no_adapter_is_told_from_one(tiny_model, tmp_path, file, message):
    (tmp_path / file).write_text(json.dumps({}))
    with pytest.raises(ConfigError, match=message):
        merge(tiny_model, tmp_path, tmp_path / "merged")


def peft_adapter(model, directory, **settings):
    """An adapter that PEFT itself has made and saved, and the logits of the model with it."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wrapped = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)
        logits = wrapped(IDS).logits
    wrapped.save_pretrained(directory, save_embedding_layers=True)
    return directory, logits


IDS = torch.tensor([[5, 9, 3, 70, 11]])


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|tied).*")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "targets", [["q_proj", "lm_head"], ["embed_tokens", "v_proj"], ["embed_tokens", "lm_head"]]
)
def test_an_adapter_of_peft_on_embedding_or_head_merges(tiny_model, tmp_path, targets, tied):
    model = tiny_model
    if not tied:
        model = tmp_path / "untied"
        shutil.copytree(tiny_model, model)
        config = AutoConfig.from_pretrained(model)
        config.tie_word_embeddings = False
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
    adapter, logits = peft_adapter(model, tmp_path / "adapter", target_modules=targets)
    assert any(".base_layer." in name for name in weights(adapter)), "PEFT saves the weights below"
    merge(model, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|tied).*")
def test_an_embedding_of_another_size_is_named(tiny_model, tmp_path):
    adapter, _ = peft_adapter(tiny_model, tmp_path / "adapter", target_modules=["embed_tokens"])
    file, tensors = adapter / "adapter_model.safetensors", weights(adapter)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file(tensors | {name: torch.zeros(390, 32)}, file)
    with pytest.raises(DataError, match=r"base_layer\.weight has shape \[390, 32\], the model"):
        merge(tiny_model, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3 is not supported"),
        ({"peft_type": "VERA"}, "peft_type VERA is not supported"),
        ({"peft_type": None}, "peft_type None is not supported"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"bias": "all"}, "bias = all: trained biases are not supported"),
        ({"layer_replication": [[0, 9**9]]}, "layer_replication is not supported"),
        ({"trainable_token_indices": [3]}, "no tensor .*trainable_tokens_delta"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = pissa_niter_4: the adapter"),
        ({"of_a_later_release": True}, "of_a_later_release is not supported"),
        ({"r": "four"}, "adapter_config.json: "),
    ],
)
def test_what_else_peft_trains_is_refused_by_name(tiny_model, tmp_path, change, message):
    adapter = adapter_of(tiny_model, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((ConfigError, DataError), match=message):
        merge(tiny_model, adapter, tmp_path / "merged")


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoints; name a run directory"):
        find_checkpoint(tmp_path, 7)
    for name in ("step-000006", "step-000008"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="after step 7, but step-000006, step-000008"):
        find_checkpoint(tmp_path, 7)
    assert find_checkpoint(tmp_path, None).name == "step-000008"
