"""Tiles, placeholders and pixel values of each vision family, as transformers gives them.

Compared with the processors over Pillow (`image_processing_pil_*` of transformers 5.23), value for
value; those over torchvision smooth a little differently.
"""

import random

import numpy as np
import pytest
from pictures import noise
from transformers.image_transforms import normalize, rescale
from vision_models import VISION_MODELS

from headrace.dataprep.images.families import RULES, family_rule
from headrace.dataprep.images.picture import PictureError
from headrace.schemas.vision.families import FAMILIES
from headrace.schemas.vision.processor import read_processor

SHORT, LONG = 12, 500  # sizes of each family


def sizes(count, largest, seed):
    """Random sizes: as many long and thin ones as others, some tiny, some exactly equal."""
    chance = random.Random(seed)
    for number in range(count):
        width = chance.randint(1, largest)
        height = chance.choice([width, chance.randint(1, largest), chance.randint(1, largest)])
        if number % 3 == 0:
            height = max(1, width // chance.randint(1, 60))
        height = max(height, -(-width // 200))  # Qwen refuses what is longer
        width = max(width, -(-height // 200))
        yield (width, height) if number % 2 else (height, width)


def assert_equal(name, folder, size, seed, small, changes, call):
    model = VISION_MODELS[name]
    processor = read_processor(folder, changes)
    image = noise(size, seed)
    prepared = family_rule(processor).prepare(image)
    values, text = model.reference(image, small, **call)
    assert prepared.text == text, size
    placeholder = processor.tokens["placeholder"]
    assert prepared.tokens == text.count(placeholder) > 0
    assert len(prepared.tiles) == len(values)
    settings = processor.settings
    for tile, wanted in zip(prepared.tiles, values, strict=True):
        found = np.moveaxis(np.asarray(tile), -1, 0)
        found = rescale(found, settings["rescale_factor"])
        mean, std = settings["image_mean"], settings["image_std"]
        found = normalize(found, mean, std, input_data_format="channels_first")
        assert found.shape == wanted.shape, size
        assert np.array_equal(found, wanted), size


CHANGED = {  # of sizes: what a config changes, and how transformers is told
    "gemma3": {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 40},
    "idefics3": {"do_image_splitting": False},
    "internvl": {"max_patches": 6, "min_patches": 2},
    "llava": {"do_pad": True},
}


@pytest.mark.parametrize("name", VISION_MODELS)
def test_pictures_are_prepared_as_by_transformers(name, tmp_path):
    folder = VISION_MODELS[name].write(tmp_path, small=True)
    for number, size in enumerate(sizes(SHORT, 220, seed=name)):
        assert_equal(name, folder, size, number, True, {}, {})


@pytest.mark.parametrize("name", CHANGED)
def test_settings_that_a_config_changes_do_what_they_do_in_transformers(name, tmp_path):
    folder = VISION_MODELS[name].write(tmp_path, small=True)
    for number, size in enumerate(sizes(SHORT, 220, seed=name)):
        assert_equal(name, folder, size, number, True, CHANGED[name], CHANGED[name])


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", VISION_MODELS)
def test_500_sizes_are_prepared_as_by_transformers(name, tmp_path):
    folder = VISION_MODELS[name].write(tmp_path)
    for number, size in enumerate(sizes(LONG, 900, seed=name)):
        assert_equal(name, folder, size, number, False, {}, {})


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CHANGED)
def test_changed_settings_over_500_sizes(name, tmp_path):
    folder = VISION_MODELS[name].write(tmp_path)
    for number, size in enumerate(sizes(LONG, 900, seed=name)):
        assert_equal(name, folder, size, number, False, CHANGED[name], CHANGED[name])


def test_every_family_has_a_rule_and_a_test():
    assert set(RULES) == set(FAMILIES) == set(VISION_MODELS)


def test_a_picture_200_times_as_long_as_wide_is_refused_where_the_family_refuses_it(tmp_path):
    rule = family_rule(read_processor(VISION_MODELS["qwen2_vl"].write(tmp_path)))
    rule.prepare(noise((200, 1)))
    with pytest.raises(PictureError, match="absurd"):
        rule.prepare(noise((201, 1)))
