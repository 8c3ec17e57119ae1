"""Models whose weights are in other files than safetensors: pickles of torch, and GGUF."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from saved_parts import adapter_of, saved_model, step
from tiny_families import build, config_of, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

from headrace.jobs import cli
from headrace.schemas.errors import ConfigError, DataError
from headrace.trainer.architecture.gguf_index import gguf_files
from headrace.trainer.architecture.weight_index import weights_fingerprint
from headrace.trainer.building.parameter_slots import find_slots
from headrace.trainer.export import gguf_export
from headrace.trainer.export.gguf_export import export_gguf
from headrace.trainer.export.merge import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def held_by(built):
    return {
        slot.name: slot.empty.detach() for part in built for slot in find_slots(part.stage.names)
    }


def same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name


def pickled(model, directory, files=1):
    """The same weights as torch pickles them, in one file or under an index."""
    shutil.copytree(model, directory)
    (directory / "model.safetensors").unlink()
    tensors = load_file(model / "model.safetensors")
    names = [f"pytorch_model-{n}.bin" if files > 1 else "pytorch_model.bin" for n in range(files)]
    places = {key: names[number % files] for number, key in enumerate(tensors)}
    for name in names:
        own = {key: value for key, value in tensors.items() if places[key] == name}
        torch.save(own, directory / name)
    if files > 1:
        index = {"weight_map": places}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_pickles_give_the_weights_that_safetensors_give(family, files, tmp_path):
    model = save_tiny(family, tmp_path / "model", num_hidden_layers=2)
    directory = pickled(model, tmp_path / "pickled", files)
    with pytest.raises(DataError, match=r'is read only with weights = "pickled"'):
        build(config_of(directory))
    built = build(config_of(directory, 2, weights="pickled"))
    same(held_by(built), held_by(build(config_of(model, 2))))


def test_an_adapter_is_merged_into_a_pickled_model(tiny_model, tmp_path):
    base = pickled(tiny_model, tmp_path / "base")
    adapter = adapter_of(tiny_model, tmp_path / "adapter")
    command = ["merge", "--adapter", str(adapter), "--model", str(base)]
    with pytest.raises(SystemExit, match='read only with weights = "pickled"'):
        cli.main([*command, "--output", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([*command, "--output", str(tmp_path / "one"), "--pickled"])
    merge(tiny_model, adapter, tmp_path / "other")
    merged = [
        {
            key: value
            for file in (tmp_path / name).glob("*.safetensors")
            for key, value in load_file(file).items()
        }
        for name in ("one", "other")
    ]
    same(*merged)


class Calls:
    def __reduce__(self):
        return print, ("called",)


def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(tmp_path, capsys):
    directory = pickled(save_tiny("llama", tmp_path / "model"), tmp_path / "pickled")
    file = directory / "pytorch_model.bin"
    cases = {
        "cannot be read as tensors alone": lambda: torch.save({"a": Calls()}, file),
        "does not lie in one piece, as torch 1.6": lambda: torch.save(
            {"model.norm.weight": torch.zeros(32)}, file, _use_new_zipfile_serialization=False
        ),
        r"cannot be read as tensors alone \(": lambda: file.write_bytes(pickle.dumps([1])[:-1]),
        "holds a list, not tensors by name": lambda: torch.save([torch.zeros(2)], file),
    }
    for message, damage in cases.items():
        damage()
        with pytest.raises(DataError, match=message):
            build(config_of(directory, weights="pickled"))
    assert "called" not in capsys.readouterr().out


GGUF_FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 128, "tie_word_embeddings": False},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    "phi3": {"sliding_window": None, "tie_word_embeddings": False},
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def gguf_model(family, kind, tiny_model, directory, original=None):
    """A model directory with a GGUF file instead of safetensors, which `original` keeps."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **SHAPE | GGUF_FAMILIES[family]), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, directory)
    if original is not None:
        shutil.copytree(directory, original)
    export_gguf(directory, directory / "model.gguf", kind)
    (directory / "model.safetensors").unlink()
    return directory


@pytest.fixture
def four_bits(monkeypatch):
    """Lets models be exported in 4 bits."""
    kind = (GGMLQuantizationType.Q4_0, gguf_export.FILE_TYPES["q8_0"][1])
    monkeypatch.setitem(gguf_export.FILE_TYPES, "q4_0", kind)


CASES = [("llama", "q4_0"), ("qwen3", "q8_0"), ("gemma2", "f16"), ("phi3", "bf16")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_gguf_gives_the_weights_that_transformers_reads_from_it(
    family, kind, tiny_model, four_bits, tmp_path
):
    directory = gguf_model(family, kind, tiny_model, tmp_path / "model")
    built = build(config_of(directory, 2))
    theirs = AutoModelForCausalLM.from_pretrained(
        directory,
        gguf_file="model.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    expected = dict(theirs.named_parameters())
    assert built[0].architecture.tied == ("lm_head.weight" not in expected)
    if built[0].architecture.tied:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    same(held_by(built), expected)


OTHERS = {
    "cohere": {"logit_scale": 0.5, "tie_word_embeddings": True},
    "granite": {"residual_multiplier": 0.5},
    "olmo2": {},
    "starcoder2": {"sliding_window": None},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", OTHERS)
def test_gguf_gives_back_the_weights_that_were_exported(family, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(GGUF_FAMILIES, family, OTHERS[family])
    kept = tmp_path / "kept"
    directory = gguf_model(family, "f32", tiny_model, tmp_path / "model", kept)
    original = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)
    expected = dict(original.named_parameters())
    built = build(config_of(directory, 2))
    if built[0].architecture.tied:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    same(held_by(built), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_gguf_is_saved_as_safetensors(tiny_model, four_bits, tmp_path):
    directory = gguf_model("qwen3", "q4_0", tiny_model, tmp_path / "model")
    built = build(config_of(directory, 2, {"kind": "none"}))
    step(built)
    trained = {item.name: item.parameter for part in built for item in part.trained}
    saved = AutoModelForCausalLM.from_pretrained(saved_model(built, directory, tmp_path / "saved"))
    for name, value in saved.named_parameters():
        assert torch.equal(value, trained[name]), name


@pytest.mark.filterwarnings("ignore")
def test_gguf_that_is_not_read_is_refused_by_name(tiny_model, tmp_path):
    directory = gguf_model("llama", "f16", tiny_model, tmp_path / "model")
    first = weights_fingerprint(directory)
    shutil.copy(directory / "model.gguf", directory / "other.gguf")
    with pytest.raises(DataError, match=r"model.gguf, other.gguf are not the parts of one model"):
        build(config_of(directory))
    data = (directory / "other.gguf").read_bytes()
    (directory / "other.gguf").unlink()
    (directory / "model.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"model.gguf: .*; fetch the model again"):
        build(config_of(directory))
    assert weights_fingerprint(directory) != first
    config = directory / "config.json"
    (directory / "model.gguf").write_bytes(data)
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"model_type": "mistral3_text_unknown"}))
    with pytest.raises(ConfigError):
        build(config_of(directory))
    config.unlink()
    with pytest.raises(ConfigError, match=r"config.json: not found"):
        build(config_of(directory))


def test_a_family_without_a_layout_in_gguf_is_refused_by_name(tmp_path, tiny_model):
    directory = gguf_model("llama", "f16", tiny_model, tmp_path / "model")
    other = save_tiny("qwen2_moe", tmp_path / "other", num_hidden_layers=2)
    (other / "model.safetensors").unlink()
    shutil.copy(directory / "model.gguf", Path(other) / "model.gguf")
    with pytest.raises(ConfigError, match=r'"qwen2_moe" is not read from GGUF \(read are '):
        build(config_of(other))


def test_the_parts_of_one_gguf_model_are_read_together(tmp_path):
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in gguf_files(tmp_path)] == names
    (tmp_path / names[1]).unlink()
    with pytest.raises(DataError, match="are not the parts of one model"):
        gguf_files(tmp_path)
