"""What `headrace plan` counts of a vision tower, compared with what autograd saves."""

import weakref
from dataclasses import replace

import pytest
import torch
from built_stages import build_stage
from tiny_families import CPU, config_of
from tiny_vision import FAMILIES, save_tiny
from torch.autograd.graph import saved_tensors_hooks

from headrace.trainer.building.self_check import plan_model
from headrace.trainer.planning.memory_model import NO_TOWER
from headrace.trainer.planning.run_plan import count_tower, plan_run
from headrace.trainer.planning.tower_activations import (
    arguments_of,
    kept_by_tower,
)

LORA = {"kind": "lora", "rank": 4, "vision": True}
FULL = {"kind": "none"}
ALL = pytest.mark.exhaustive
SHORT = [("qwen2_5_vl", "LoRA"), ("pixtral", "full")]
ADAPTERS = {"LoRA": LORA, "full": FULL}
CASES = [
    pytest.param(family, adapter, marks=() if (family, adapter) in SHORT else ALL)
    for family in FAMILIES
    for adapter in ADAPTERS
]


def config_for(family, folder, adapter, **settings):
    vision = {"projector": True, "train": adapter == FULL}
    model = save_tiny(family, folder / "model")
    return config_of(model, 2, adapter, dtype="float32", vision=vision, **settings)


def kept_bytes(tower, arguments):
    """Bytes that autograd holds of a tower with weights, beside these; the number of features."""
    weights = [p for part in tower.modules.values() for p in part.parameters()]
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    alive = weakref.WeakValueDictionary()

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def keep(tensor):
        kept = alive[len(seen)] = Kept(tensor)
        seen.append(tensor.shape)
        return kept

    seen = []
    with saved_tensors_hooks(keep, lambda kept: kept.tensor):
        features = tower.features(arguments, torch.empty(0))
    storages = [kept.tensor.untyped_storage() for kept in alive.values()]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for place, size in sizes.items() if place not in own), len(features.values)


@pytest.mark.parametrize(("family", "adapter"), CASES)
def test_a_tower_keeps_what_autograd_saves(family, adapter, tmp_path):
    config = config_for(family, tmp_path, ADAPTERS[adapter])
    plan = plan_model(config)
    built = build_stage(config, 0, CPU, plan)
    given = arguments_of(plan, config, 3)
    saved, features = kept_bytes(built.stage.tower, given)
    counted = count_tower(plan_model(config), config, torch.float32, 2 * features)
    assert counted.kept == pytest.approx(saved, rel=1e-6)
    assert counted.given == sum(tensor.nbytes for tensor in given.values())
    large = kept_by_tower(built.stage.tower, given, 1)
    assert large == kept_by_tower(built.stage.tower, given, 1 << 60), "unwritten or written"


def test_the_stage_of_the_tower_is_planned_with_what_it_keeps(tmp_path):
    config = config_for("qwen2_vl", tmp_path, LORA, gradient_accumulation_steps=4)
    plan = plan_model(config)
    run = plan_run(config, plan, 2, 64)
    tower = run.activations.tower
    assert tower.kept > tower.given > 0
    without = plan_run(config, plan, 2, 64, replace(run.activations, tower=NO_TOWER), run.size)
    more = [a.memory.peak - b.memory.peak for a, b in zip(run.stages, without.stages, strict=True)]
    assert more == [pytest.approx(2 * tower.kept), 0.0], "two micro-batches are in flight"
    again = config.model_copy(update={"activation_checkpointing": "full"})
    assert tower.held(again) == 2 * tower.given + tower.kept


def test_a_frozen_tower_keeps_nothing(tmp_path):
    model = save_tiny("qwen2_vl", tmp_path / "model")
    config = config_of(model, 2, {"kind": "lora", "rank": 4}, dtype="float32", vision={})
    assert count_tower(plan_model(config), config, torch.float32, 64) is NO_TOWER
