"""Pictures decoded, positions of packed documents, and what does not go with pictures."""

import io
import re
from collections import Counter

import numpy as np
import pytest
import torch
from pictures import encoded, noise
from PIL import Image
from tiny_families import config_of
from tiny_vision import batch_of, make_rows, save_tiny, sizes_of, their_arguments

from headrace.kernels.attention.document_attention import visible_keys
from headrace.schemas.errors import ConfigError, DataError
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.layers.attention_mask import attention_masks
from headrace.trainer.layers.document_attention import last_of_groups
from headrace.trainer.planning.run_plan import plan_run
from headrace.trainer.vision.families import vision_family
from headrace.trainer.vision.pictures import decode
from headrace.trainer.vision.positions import picture_groups, three_axes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("qwen2_vl", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "idefics3", "llava_next", "mistral3"])
def test_pixels_are_those_of_transformers_processor_to_the_last_bit(family, tmp_path):
    rows = make_rows(family, [[4, 3]])
    given = batch_of(save_tiny(family, tmp_path), rows).extras[0].vision.arguments
    theirs = their_arguments(tmp_path, family, rows[0].images)
    pixels = torch.as_tensor(np.asarray(theirs["pixel_values"]))
    if family == "llava_next":  # which fills up with tiles of zeros
        counts = Counter(tile.picture for tile in rows[0].images)
        pixels = torch.cat([pixels[picture, :count] for picture, count in counts.items()])
    assert torch.equal(given["pixel_values"].reshape(-1), pixels.reshape(-1))
    for name in given.keys() - {"pixel_values"}:
        assert torch.equal(given[name], torch.as_tensor(theirs[name])), name
    assert len(sizes_of(family)) >= 1


def test_positions_restart_at_every_document_and_go_on_behind_a_picture():
    mask = np.array([0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0], bool)
    found = three_axes(mask, [8, 3], iter([(2, 3), (1, 1)]))
    assert found[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 4, 0, 1, 2]
    assert found[1].tolist() == [0, 1, 1, 1, 2, 2, 2, 4, 0, 1, 2]
    assert found[2].tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 0, 1, 2]


def test_groups_of_picture_tokens_end_with_their_document():
    mask = np.array([0, 1, 1, 1, 0, 1], bool)
    assert picture_groups(mask, [3, 3]).tolist() == [-1, 0, 0, 1, -1, 2]


def test_what_is_no_picture_is_refused_by_name():
    with pytest.raises(DataError, match="row 3, picture 0: cannot be decoded"):
        decode(b"no picture", "row 3, picture 0")
    target = io.BytesIO()
    Image.new("RGB", (4, 4)).save(target, "BMP")
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(target.getvalue(), "row 3")
    assert decode(encoded(noise((5, 3))), "row 3").shape == (3, 5, 3)


def test_a_row_without_tokens_for_its_pictures_is_refused(model):
    rows = make_rows("qwen2_vl", [[1]])
    ids = np.where(rows[0].input_ids == 7, 20, rows[0].input_ids)
    with pytest.raises(DataError, match="rows hold 0 placeholders"):
        batch_of(model, [rows[0]._replace(input_ids=ids)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_parallel": 2}, "[vision] does not go with sequence_parallel"),
        ({"tensor_parallel": 2, "adapter": {}}, "[vision] does not go with tensor_parallel"),
        ({"half_layers": True}, "[vision] does not go with half_layers"),
        ({"adapter": {"kind": "control"}}, '[vision] does not go with adapter.kind = "control"'),
        ({"objective": {"kind": "reward"}}, '[vision] does not go with objective.kind = "reward"'),
        ({"vision": {"train": True}, "adapter": {}}, "set adapter.vision = true"),
        (
            {"objective": {"kind": "distill", "teacher": "model"}},
            "[vision]: objective.teacher reads texts alone",
        ),
        ({"vision_stages": 1}, "leaves no stage for the decoder layers"),
        ({"vision": None, "adapter": {"vision": True}}, "needs the table [vision]"),
    ],
)
def test_what_has_no_place_for_pictures_is_refused(model, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(model, **{"vision": {}, **settings})


def test_families_without_a_record_are_refused_by_name():
    with pytest.raises(ConfigError, match='"fuyu" is not supported with pictures'):
        vision_family("model", "fuyu", None)


def test_adapters_on_the_tower_must_match_something_there(model):
    adapter = {"vision": True, "target_modules": ["q_proj"]}
    with pytest.raises(ConfigError, match=r"nothing in the vision tower; add some of .*qkv"):
        plan_model(config_of(model, adapter=adapter, vision={}))
    kept = plan_model(config_of(model, adapter={"rank": 2}, vision={})).method.peft
    assert not any("visual" in name for name in kept.target_modules)


def test_a_plan_counts_the_tower_where_it_lies(model):
    config = config_of(model, 2, vision={"train": True}, vision_stages=1)
    first, second = plan_run(config, plan_model(config), 2, 64).stages
    tower = sum(p.numel() for n, p in plan_model(config).plain.named_parameters() if "visual" in n)
    assert [str(span) for span in first.layers] == ["none"]
    assert first.weights == tower + 97 * 32
    assert first.work > 0
    assert second.trained == second.weights


@pytest.mark.parametrize("window", [None, 7, 2])
def test_blocks_of_both_ways_are_the_masks(window):
    lengths = [[10, 6], [16]]
    seen = torch.zeros(2, 16, dtype=torch.bool)
    seen[0, 2:6] = seen[0, 8:13] = seen[1, 1:5] = seen[1, 15] = True
    rows = [picture_groups(mask, part) for mask, part in zip(seen.numpy(), lengths, strict=True)]
    groups = torch.from_numpy(np.stack(rows))
    expected = attention_masks(lengths, [window], torch.device("cpu"), groups=groups)[window]
    bounds = torch.tensor([0, 10, 16, 32], dtype=torch.int32)
    first, last = visible_keys(bounds, bounds, 32, window or -1)
    last = last_of_groups(last, groups)
    keys = torch.arange(32)
    found = (keys >= first.unsqueeze(1)) & (keys <= last.unsqueeze(1))
    for row in range(2):
        own = slice(16 * row, 16 * row + 16)
        assert torch.equal(found[own, own], expected[row, 0])
    assert found.sum() == expected.sum()
    assert (first[1:] >= first[:-1]).all() and (last[1:] >= last[:-1]).all()
