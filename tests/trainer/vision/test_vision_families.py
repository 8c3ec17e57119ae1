"""Vision-language models in stages: losses and gradients of packed documents with pictures."""

import pytest
import torch
from built_stages import build_stage
from tiny_families import CPU, config_of, gradients_of, run_micro_batch
from tiny_vision import FAMILIES, batch_of, make_rows, reference_losses, save_tiny
from transformers import AutoModelForImageTextToText

from headrace.trainer.building.self_check import plan_model
from headrace.trainer.sequence_slice import WHOLE
from headrace.trainer.stage.micro_batch import MicroBatch
from headrace.trainer.vision.tower_attention import attend_by_bounds


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = save_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def run(config, batch):
    plan = plan_model(config)
    built = [build_stage(config, n, CPU, plan) for n in range(config.pipeline_stages)]
    micro_batch = MicroBatch(
        batch.document_lengths[0],
        batch.row_lengths[0],
        batch.labels[0].long(),
        1 / batch.trained_tokens,
        1.0,
        0,
        extras=batch.extras[0].to(CPU, WHOLE),
    )
    for part in built:
        part.stage.train()
    outputs = run_micro_batch(built, batch.input_ids[0].long(), micro_batch)
    if built[0].tied_copy is not None:
        head = built[0].tied_head if len(built) == 1 else built[-1].tied_copy
        built[0].tied_copy.grad += head.grad
    return outputs[-1].value, gradients_of(built)


ALL = pytest.mark.exhaustive
SHORT = {"qwen2_vl", "qwen3_vl_moe", "gemma3", "idefics3", "llava_next", "pixtral"}
USUAL = [family if family in SHORT else pytest.param(family, marks=ALL) for family in FAMILIES]


@pytest.mark.parametrize(
    ("stages", "apart"),
    [
        (2, 0),
        *(pytest.param(*layout, marks=ALL) for layout in [(1, 0), (3, 0), (2, 1), (3, 1)]),
    ],
)
@pytest.mark.parametrize("family", USUAL)
def test_packed_documents_with_pictures_equal_transformers(models, family, stages, apart):
    model, rows = models(family), make_rows(family)
    settings = {"vision": {"train": True, "projector": True}, "vision_stages": apart}
    if family.endswith("moe"):
        settings["router_loss"] = 0.0
    config = config_of(model, stages, **settings)
    loss, gradients = run(config, batch_of(model, rows))
    theirs = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    total, count = reference_losses(model, theirs, family, rows)
    (total / count).backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    torch.testing.assert_close(loss.item(), (total / count).item(), rtol=1e-5, atol=0)
    assert {n for n, g in gradients.items() if g is not None} == set(expected)
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() / whole < 1e-5, name


@pytest.mark.parametrize("layout", [{"vision_stages": 1}, {"partition": [1, 3]}])
def test_deep_stacked_features_cross_the_border_of_stages(models, layout):
    model = models("qwen3_vl")
    batch = batch_of(model, make_rows("qwen3_vl"))
    whole = {"vision": {"train": True, "projector": True}}
    loss, gradients = run(config_of(model, 1, **whole), batch)
    apart, others = run(config_of(model, 2, **whole, **layout), batch)
    torch.testing.assert_close(apart, loss, rtol=1e-6, atol=0)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() / norm < 1e-6, name


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_tower_that_is_given_its_bounds_equals_one_without(models, family):
    config = config_of(models(family), 1, vision={"train": True})
    batch = batch_of(models(family), make_rows(family, documents=((2, 1),)))
    vision = batch.extras[0].to(CPU, WHOLE).vision
    found = []
    for by_bounds in (False, True):
        tower = build_stage(config, 0, CPU, plan_model(config)).stage.tower
        tower.by_bounds = by_bounds
        if by_bounds:
            attend_by_bounds(tower.body.visual)
        features = tower.features(vision.arguments, vision.places)
        sum(part.square().sum() for part in (features.values, *features.stacked)).backward()
        gradient = next(tower.body.visual.blocks[0].parameters()).grad
        found.append([features.values, *features.stacked, gradient])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
