"""A checkpoint becomes what the run itself would have written, whatever was trained."""

import json

import pytest
import torch
from alone import layout_of_one
from built_stages import build_stage
from checkpoints import state
from safetensors.torch import load_file

from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.checkpoint.checkpoint_folder import CheckpointFolder
from headrace.trainer.checkpoint.saver import Saver
from headrace.trainer.export.convert import convert
from headrace.trainer.export.export import export
from headrace.trainer.optim.optimizer import build_optimizer
from headrace.trainer.optim.states import averaged

KINDS = {
    "LoRA, averaged": {"optimizer": {"type": "adamw_schedule_free", "lr": 1e-2}},
    "DoRA": {"adapter": {"kind": "dora", "rank": 4}},
    "PiSSA": {"adapter": {"init": "pissa", "rank": 4}},
    "control": {"adapter": {"kind": "control", "rank": 4}},
    "blocks": {"adapter": {"kind": "blocks", "blocks": 2}},
    "some weights": {"adapter": {"kind": "none", "target_modules": ["q_proj", "embed_tokens"]}},
}


@pytest.fixture
def layout():
    with layout_of_one() as alone:
        yield alone


def record(tiny_model, run, **tables):
    """A run directory without checkpoints, and its only stage."""
    values = {"model": str(tiny_model), "output_dir": str(run), "datasets": [{"path": "unused"}]}
    config = TrainConfig.model_validate(values | {"optimizer": {"lr": 1e-2}} | tables)
    run.mkdir()
    (run / "train.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    return config, build_stage(config, 0, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_run_would_have_written(kind, tiny_model, tmp_path, layout):
    run = tmp_path / "run"
    config, built = record(tiny_model, run, **KINDS[kind])
    optimizer = build_optimizer(config.optimizer, built.trained)
    torch.manual_seed(0)
    for _ in range(2):
        for item in built.trained:
            item.parameter.grad = torch.randn_like(item.parameter)
        if built.tied_head is not None:
            built.tied_head.grad = None
        optimizer.step()
    folder = CheckpointFolder(run, keep_last=2)
    Saver(folder, layout, background=False).begin(state(2), built.trained, optimizer, built.kept)
    with averaged(optimizer, built.trained):
        expected = export(built, layout, tiny_model, run, 2)

    convert(run, tmp_path / "converted", 2)
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in (tmp_path / "converted").iterdir()) == names
    for file in expected.glob("*.safetensors"):
        tensors, found = load_file(file), load_file(tmp_path / "converted" / file.name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    for file in expected.glob("*.json"):
        assert (tmp_path / "converted" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_converted_model_brings_its_tokenizer(tiny_model, tmp_path, layout):
    run = tmp_path / "run"
    config, built = record(tiny_model, run, **KINDS["blocks"])
    optimizer = build_optimizer(config.optimizer, built.trained)
    Saver(CheckpointFolder(run, 1), layout, background=False).begin(
        state(1), built.trained, optimizer, built.kept
    )
    convert(run, tmp_path / "converted")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "converted" / name).read_bytes() == (tiny_model / name).read_bytes()


def test_an_adapter_is_written_in_the_type_asked_for(tiny_model, tmp_path, layout):
    _, built = record(tiny_model, tmp_path / "run")
    result = export(built, layout, tiny_model, tmp_path / "run", 2, save_dtype="bfloat16")
    tensors = load_file(result / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    held = {item.name.replace(".default", ""): item.parameter for item in built.trained}
    assert tensors.keys() == held.keys()
    assert all(torch.equal(tensors[name], held[name].bfloat16()) for name in tensors)
