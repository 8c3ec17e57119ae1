"""What a model directory says about pictures, and where it is not followed."""

import json

import pytest
from pictures import images_record
from vision_models import VISION_MODELS

from headrace.schemas.errors import ConfigError
from headrace.schemas.vision.processor import differing, read_processor

PREPROCESSOR, CONFIG = "preprocessor_config.json", "config.json"


def write(folder, name="qwen2_vl", **changes):
    VISION_MODELS[name].write(folder)
    for file, values in changes.items():
        path = folder / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize("name", VISION_MODELS)
def test_families_are_told_by_model_type_and_processor(name, tmp_path):
    processor = read_processor(VISION_MODELS[name].write(tmp_path))
    assert processor.family == name
    assert set(processor.tokens) >= {"marker", "placeholder"}
    assert json.loads(json.dumps(processor.settings)) == processor.settings


def test_a_mixture_is_prepared_as_its_family(tmp_path):
    folder = write(tmp_path, "qwen3_vl", config={"model_type": "qwen3_vl_moe"})
    assert read_processor(folder).family == "qwen3_vl"


def test_a_processor_inside_of_another_file_is_found(tmp_path):
    folder = write(tmp_path)
    plain = read_processor(folder)
    image = json.loads((folder / PREPROCESSOR).read_text())
    (folder / PREPROCESSOR).unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": image}))
    assert read_processor(folder) == plain


REFUSED = {
    "another family": ({"config": {"model_type": "florence2"}}, 'model_type "florence2" are not'),
    "another processor": (
        {"preprocessor_config": {"image_processor_type": "ViTImageProcessor"}},
        'image processor "ViT" of a qwen2_vl is not known',
    ),
    "a step left out": ({"preprocessor_config": {"do_resize": False}}, "do_resize = false"),
    "no number": ({"preprocessor_config": {"patch_size": 0}}, "patch_size = 0 is not a whole"),
    "no color": ({"preprocessor_config": {"image_mean": [0.5]}}, "is not three numbers"),
    "no filter": ({"preprocessor_config": {"resample": 9}}, "none of Pillow's filters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused(case, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        read_processor(write(tmp_path, **changes))


def test_a_directory_without_a_processor_is_refused(tmp_path):
    (tmp_path / CONFIG).write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"preprocessor_config.json: not found; name the dir"):
        read_processor(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 16}, '"patch_size" is no setting of qwen2_vl that a config may change'),
        ({"max_pixels": "many"}, "max_pixels = 'many' is not a number above 0"),
        ({"max_pixels": True}, "is not a number above 0"),
    ],
)
def test_only_sizes_may_be_changed(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_processor(write(tmp_path), changes)


def test_settings_that_a_model_would_not_take_are_named(tmp_path):
    own = read_processor(write(tmp_path))
    recorded = images_record("qwen2_vl", own.settings | {"max_pixels": 5, "patch_size": 16}, 7)
    assert differing(recorded, own) == ["patch_size = 16, the model's is 14"]
    other = images_record("llava", own.settings, 7)
    assert differing(other, own) == ["family = llava, the model's is qwen2_vl"]
    assert differing(images_record("qwen2_vl", own.settings, 7), own) == []
