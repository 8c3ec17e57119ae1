"""Pictures of prompts are opened as those that a model is trained on."""

import numpy as np
import pytest
from PIL import Image

from headrace.jobs.serve.picture_prompt import opened
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.images_config import ImagesConfig


def test_transparent_parts_of_a_prompts_picture_lie_on_white_as_in_training(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(path)
    assert np.asarray(opened(path, ImagesConfig(model="m"))).tolist() == [[[255] * 3] * 4] * 4


@pytest.mark.parametrize("content", [b"<svg/>", None], ids=["no picture", "no file"])
def test_what_is_no_picture_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png: (no picture \(it is SVG|cannot be read)"):
        opened(path, ImagesConfig(model="m"))
