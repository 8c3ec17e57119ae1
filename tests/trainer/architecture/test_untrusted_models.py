"""Models and adapters from elsewhere: what cannot be is refused in one line, and nothing hangs."""

import json
import os
import shutil
import struct
import time
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from headrace.schemas.errors import HeadraceError
from headrace.trainer.adapters.patterns import name_modules
from headrace.trainer.architecture.config_limits import read_model_config
from headrace.trainer.architecture.model_writer import save_tensors
from headrace.trainer.architecture.read_architecture import read_whole_config
from headrace.trainer.architecture.weight_index import read_header, stored_tensors, weight_files
from headrace.trainer.export.gguf_parts import check_pairs
from headrace.trainer.export.sample import check_generation, tokenizer_errors

LAYERS = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(4) for p in "qkvo"]
SLOW = "((a|aa)+)+(?<!a)"  # for ever over many an "a"


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(action, *arguments):
    with pytest.raises(HeadraceError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SIZES = {
    "num_hidden_layers": 10**9,
    "vocab_size": 10**15,
    "hidden_size": 10**12,
    "intermediate_size": 10**18,
    "num_attention_heads": 10**10,
    "num_experts": 10**9,
    "head_dim": -1,
    "max_position_embeddings": 1e300,
    "num_key_value_heads": "four",
}


@pytest.mark.parametrize("key", SIZES)
def test_sizes_that_the_weights_cannot_have_are_refused(model, key):
    edit(model / "config.json", **{key: SIZES[key]})
    assert f"config.json: {key} = " in refused(read_model_config, model)


def test_without_weights_sizes_have_limits_of_their_own(model):
    (model / "model.safetensors").unlink()
    read_model_config(model)
    edit(model / "config.json", num_hidden_layers=10**9)
    assert "num_hidden_layers" in refused(read_model_config, model)


@pytest.mark.parametrize("text", ["[]", '"x"', "[" * 100_000, "{", "9" * 5000, "null"])
def test_a_config_that_is_no_object_is_refused(model, text):
    (model / "config.json").write_text(text)
    assert "config.json: " in refused(read_model_config, model)


def test_a_list_in_place_of_an_object_is_refused(model):
    edit(model / "config.json", rope_scaling=[1])
    assert "rope_scaling is a list, not an object" in refused(read_model_config, model)


def test_a_fifo_in_place_of_the_config_or_the_weights_is_named(model):
    for name in ("model.safetensors", "config.json"):
        (model / name).unlink()
        os.mkfifo(model / name)
        assert f"{name}: not a regular file" in refused(
            stored_tensors if name.startswith("model") else read_model_config, model
        )


# --- weights ---


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", 5, "", "a/../../b"])
def test_an_index_names_files_of_its_directory_alone(model, name):
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    assert str(index) in refused(weight_files, model)


def test_a_weight_file_that_is_a_link_out_of_the_directory_is_refused(model, tmp_path):
    path = model / "model.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "a symbolic link that leaves its directory" in refused(weight_files, model)


@pytest.mark.parametrize("shift", [-64, 64])
def test_tensors_that_overlap_or_leave_holes_are_refused(model, shift):
    path = model / "model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")
    header[name]["data_offsets"] = [at + shift for at in header[name]["data_offsets"]]
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + content[8 + size :])
    assert str(path) in refused(read_header, path)


# --- adapters ---


def settings(**changes):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": SLOW}, "target_modules: .* takes longer than"),
        ({"exclude_modules": SLOW}, "exclude_modules: .* takes longer than"),
        ({"rank_pattern": {SLOW: 4}}, "rank_pattern: .* takes longer than"),
        ({"alpha_pattern": {SLOW: 4}}, "alpha_pattern: .* takes longer than"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"target_modules": "nothing"}, "matches no module"),
        ({"target_modules": "a" * 20_000}, "has more than 10000 letters"),
        ({"modules_to_save": [SLOW]}, "modules_to_save: .* is not the name of a module"),
        (
            {"layers_to_transform": [0], "layers_pattern": SLOW},
            "layers_pattern: .* is not the name of a module",
        ),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication is not supported"),
    ],
)
def test_adapters_that_would_hang_are_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("headrace.trainer.adapters.patterns.SECONDS", 0.1)
    begun = time.monotonic()
    with pytest.raises(HeadraceError, match=message):
        name_modules(settings(**changes), [*LAYERS, "a" * 400], tmp_path)
    assert time.monotonic() - begun < 5


def test_expressions_become_the_names_that_they_match(tmp_path):
    given = settings(
        target_modules=r".*\.[12]\.self_attn\.(q|v)_proj",
        exclude_modules=r".*\.2\..*q_proj",
        rank_pattern={r"layers\.1\..*": 8, "v_proj": 4},
    )
    name_modules(given, LAYERS, tmp_path)
    assert given.target_modules == {
        f"model.layers.{n}.self_attn.{p}_proj" for n in (1, 2) for p in "qv"
    }
    assert given.exclude_modules == {"model.layers.2.self_attn.q_proj"}
    assert given.rank_pattern[r"^model\.layers\.1\.self_attn\.v_proj"] == 8
    assert given.rank_pattern[r"^model\.layers\.2\.self_attn\.v_proj"] == 4


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight".format


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({A("A"): (2, 8)}, "no tensor .*lora_B.weight, the other half"),
        ({A("B"): (8, 2)}, "no tensor .*lora_A.weight, the other half"),
        ({A("A"): (2, 8), A("B"): (8, 3)}, r"has shape \[8, 3\], but r = 2"),
    ],
)
def test_half_of_a_pair_is_not_written(tmp_path, shapes, message):
    with pytest.raises(HeadraceError, match=message):
        check_pairs(shapes, 2, tmp_path, {"model.layers.0.self_attn.q_proj.weight": (8, 8)})


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """An adapter that PEFT has written for the tiny model."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(network, settings(task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


def applied(model, adapter):
    from transformers import AutoModelForCausalLM

    from headrace.trainer.export.applied_adapter import apply_adapter

    return apply_adapter(AutoModelForCausalLM.from_pretrained(model), adapter)


def renamed(tensors):
    return {key.replace("self_attn", "other"): value for key, value in tensors.items()}


def halved(tensors):
    return {key: value for key, value in tensors.items() if "lora_A" in key}


def with_more(tensors):
    return tensors | {"base_model.model.model.layers.9.mlp.x.lora_A.weight": torch.zeros(2, 2)}


def of_another_shape(tensors):
    name = next(key for key in tensors if "lora_A" in key)
    return tensors | {name: torch.zeros(2, 5)}


@pytest.mark.parametrize("change", [renamed, halved, with_more, of_another_shape])
def test_an_adapter_that_does_not_fit_the_model_is_not_sampled(
    tiny_model, adapter, tmp_path, change
):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    message = refused(applied, tiny_model, folder)
    assert message.startswith(f"{folder}: ")


def test_an_adapter_without_weights_is_not_looked_for_elsewhere(tiny_model, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refused(applied, tiny_model, folder)


def test_an_adapter_that_fits_changes_what_the_model_computes(tiny_model, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: v if "lora_A" in k else torch.ones_like(v) for k, v in tensors.items()}, file)
    network, ids = applied(tiny_model, folder), torch.tensor([[1, 2, 3]])
    with network.disable_adapter():
        plain = network(input_ids=ids).logits
    assert not torch.allclose(network(input_ids=ids).logits, plain)


# --- sampling ---


@pytest.mark.parametrize(
    ("key", "value"), [("num_beams", 10**9), ("num_return_sequences", 10**6), ("min_length", "x")]
)
def test_generation_settings_have_limits(tmp_path, key, value):
    message = refused(check_generation, SimpleNamespace(**{key: value}), tmp_path)
    assert f"generation_config.json: {key} = " in message


def test_a_panic_of_the_tokenizer_is_one_line(tmp_path):
    panic = type("PanicException", (BaseException,), {})

    def run():
        with tokenizer_errors(tmp_path):
            raise panic("retry-limit-in-match over\nand more")

    message = refused(run)
    assert (
        "tokenizer.json: its expressions fail on this text (retry-limit-in-match over)" in message
    )


def test_weights_are_written_with_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o022)
    try:
        save_tensors({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_model_type_that_nobody_knows_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llamma"}')
    with pytest.raises(HeadraceError, match='model_type "llamma" is not supported: transformers'):
        read_whole_config(tmp_path)
