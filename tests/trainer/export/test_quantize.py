"""Models in fewer bits: what transformers and we load of them is what the library packed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import save_tiny
from transformers import AutoModelForCausalLM

from headrace.jobs import cli
from headrace.schemas.errors import ConfigError
from headrace.trainer.architecture.read_architecture import lay_out, read_architecture
from headrace.trainer.building.directory_weights import StoredWeights
from headrace.trainer.export.packer import Packer
from headrace.trainer.export.quantize import SCHEMES, joined, quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # of compressed-tensors, about what CPUs lack
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny model whose rows fall into whole groups of every format."""
    return save_tiny("llama", tmp_path_factory.mktemp("plain") / "model", **WIDE)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in directory.glob("*.safetensors") for k, t in load_file(f).items()}


def for_reading(directory: Path) -> None:
    """Ask transformers to undo the packing instead of running packed."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["dequantize"] = True
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_loaded_is_what_was_packed(plain, tmp_path, name):
    output = tmp_path / "model"
    result = quantize(plain, output, name)
    assert result.weights == 14
    assert result.kept == []
    assert result.after < 0.6 * result.before
    assert 0 < result.error < 0.3
    for_reading(output)
    theirs = dict(AutoModelForCausalLM.from_pretrained(output).named_parameters())
    before = dict(AutoModelForCausalLM.from_pretrained(plain).named_parameters())
    wanted = [(parameter, value.shape) for parameter, value in before.items()]
    with StoredWeights(output, lay_out(read_architecture(output))) as source:
        for (parameter, value), ours in zip(before.items(), source.read(wanted), strict=True):
            assert torch.equal(ours, theirs[parameter].float()), parameter
            assert torch.equal(ours, value) == ("proj" not in parameter), parameter


def test_weights_that_servers_join_share_their_scale(plain, tmp_path):
    quantize(plain, tmp_path / "model", "nvfp4")
    scales = {k: t for k, t in stored(tmp_path / "model").items() if k.endswith("global_scale")}
    groups: dict[str, set[float]] = {}
    for name, value in scales.items():
        weight = name.replace("_global_scale", "")
        groups.setdefault(joined(weight), set()).add(float(value))
    assert len(groups) == 2 * 4  # q+k+v, o, gate+up, down
    assert all(len(values) == 1 for values in groups.values())


def test_experts_one_by_one_are_quantized_and_routers_are_not(tmp_path):
    model = save_tiny("qwen3_moe", tmp_path / "plain", num_hidden_layers=2)
    quantize(model, tmp_path / "model", "fp8")
    kinds = {name: value.dtype for name, value in stored(tmp_path / "model").items()}
    experts = [n for n in kinds if ".experts." in n and n.endswith("weight")]
    assert experts and all(kinds[name] == torch.float8_e4m3fn for name in experts)
    routers = [n for n in kinds if n.endswith("mlp.gate.weight")]
    assert routers and all(kinds[name] != torch.float8_e4m3fn for name in routers)
    assert (
        "lm_head"
        in json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"][
            "ignore"
        ]
    )


def test_the_library_undoes_what_it_packed():
    weight = torch.randn(8, 64)
    for name in SCHEMES.values():
        packer = Packer(name, **({"group_size": 64} if name == "W4A16" else {}))
        back = packer.unpack("a.weight", packer.pack("a.weight", weight))
        assert (back.float() - weight).norm() / weight.norm() < 0.2


def test_what_cannot_be_quantized_is_refused_before_anything_is_written(plain, tmp_path):
    quantize(plain, tmp_path / "fp8", "fp8")
    with pytest.raises(ConfigError, match="quantized already; give a model of whole weights"):
        quantize(tmp_path / "fp8", tmp_path / "again", "int8")
    with pytest.raises(ConfigError, match="exists already"):
        quantize(plain, tmp_path / "fp8", "int8")
    fused = save_tiny("gpt_oss", tmp_path / "fused", num_hidden_layers=4)
    with pytest.raises(ConfigError, match="experts in one tensor"):
        quantize(fused, tmp_path / "other", "fp8")
    turned = save_tiny("gpt2", tmp_path / "turned", num_hidden_layers=2)
    with pytest.raises(ConfigError, match="no linear layer of it can be held"):
        quantize(turned, tmp_path / "other", "fp8")
    assert not (tmp_path / "again").exists() and not (tmp_path / "other").exists()


def test_several_files_keep_their_names_and_get_an_index(plain, tmp_path):
    model = tmp_path / "cut"
    model.mkdir()
    for file in plain.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    tensors = stored(plain)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, model / file)
    quantize(model, tmp_path / "one", "nvfp4")
    quantize(plain, tmp_path / "other", "nvfp4")
    ours, whole = stored(tmp_path / "one"), stored(tmp_path / "other")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in ours)
    listed = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    assert listed["weight_map"].keys() == ours.keys()


def test_the_command(plain, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["quantize", str(plain), "--format", "int4", "--output", str(tmp_path / "m")])
    assert stop.value.code == 0
    assert "14 weights; 0.00 GiB of 0.00; largest relative change 0." in capsys.readouterr().out
