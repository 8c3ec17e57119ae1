"""A run over a checkpoint in FP8, as a user has it: planned, trained in two stages, converted."""

import json
import shutil

import pytest
import torch
from packed_models import fp8_blocks, repack
from runs import read_metrics
from safetensors.torch import load_file, save_file

from headrace.schemas.toml_config import load_config
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.export.convert import convert
from headrace.trainer.planning.run_plan import plan_run

BLOCK = [16, 8]
FP8 = {"quant_method": "fp8", "weight_block_size": BLOCK}


@pytest.fixture
def twins(tiny_model, tmp_path):
    """The checkpoint, and the model that it stands for."""
    packed = repack(tiny_model, tmp_path / "packed", fp8_blocks(BLOCK), FP8)
    whole = tmp_path / "whole"
    shutil.copytree(tiny_model, whole)
    stored = load_file(packed / "model.safetensors")
    values = {name: value for name, value in stored.items() if not name.endswith("_scale_inv")}
    for name, value in values.items():
        if value.dtype == torch.float8_e4m3fn:
            scales = stored[f"{name}_scale_inv"].repeat_interleave(BLOCK[0], 0)
            scales = scales.repeat_interleave(BLOCK[1], 1)[: value.shape[0], : value.shape[1]]
            values[name] = value.float() * scales
    save_file(values, whole / "model.safetensors", {"format": "pt"})
    return packed, whole


def test_it_trains_as_the_model_that_it_stands_for(twins, training, tmp_path):
    runs = [
        training.run(path.name, 2, model=str(path), pipeline_stages=2, max_steps=3)
        for path in twins
    ]
    losses = [[line.get("loss") for line in read_metrics(run)] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) >= 3
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    settings = json.loads((runs[0] / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(twins[0])
    convert(runs[0], tmp_path / "converted")
    assert (tmp_path / "converted" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("quantization", [None, QuantizationConfig(backend="bnb")])
def test_it_is_planned_as_the_model_that_it_stands_for(twins, training, quantization):
    peaks = []
    for path in twins:
        config = load_config(TrainConfig, training.config, [f"model={path}"])
        config = config.model_copy(update={"quantization": quantization})
        peaks.append(plan_run(config, plan_model(config), 1).peak)
    assert peaks[0] == peaks[1] > 0
