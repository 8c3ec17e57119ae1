"""The families of vision-language models, each a small record over transformers' own modules.

A record says where a model keeps its parts, how its tower is given pictures, and what its decoder
layers ask of them. Read against transformers 5.23.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.trainer.vision.arrangement import (
    Arguments,
    Numbers,
    padded,
    patches,
    tiles,
    tiles_of_one_row,
    tiles_with_sizes,
)
from headrace.trainer.vision.pictures import Picture


@dataclass(frozen=True)
class VisionFamily:
    """A model of tower, projector and language model. Paths are relative to the whole model."""

    arrange: Callable[[Sequence[Picture], Numbers], Arguments]
    body: str = "model"  # whose `get_image_features` runs tower and projector
    tower: str = "model.vision_tower"
    projectors: tuple[str, ...] = ("model.multi_modal_projector",)  # inside the tower, maybe
    language: str = "model.language_model"
    parameters: tuple[str, ...] = ()  # of the projector, that lie at the body itself
    three_axes: bool = False  # rotary positions in time, height and width
    two_way: bool = False  # tokens of a picture see each other both ways
    stacked: int = 0  # first decoder layers to which features of the tower are added again

    @property
    def modules(self) -> list[str]:
        """Paths of tower and projector, each once."""
        inside = f"{self.tower}."
        return [self.tower, *(path for path in self.projectors if not path.startswith(inside))]

    def is_projector(self, name: str) -> bool:
        """Return whether a weight of this name, in the whole model, is the projector's."""
        return name in self.parameters or name.startswith(
            tuple(f"{path}." for path in self.projectors)
        )

    def is_vision(self, name: str) -> bool:
        """Return whether a module or weight of this name is the tower's or the projector's."""
        parts = (*self.modules, *self.parameters)
        return name in parts or name.startswith(tuple(f"{path}." for path in parts))


QWEN = VisionFamily(
    patches, tower="model.visual", projectors=("model.visual.merger",), three_axes=True
)
LLAVA = VisionFamily(tiles)
IDEFICS = VisionFamily(
    tiles_of_one_row,
    tower="model.vision_model",
    projectors=("model.connector",),
    language="model.text_model",
)
# model_type in config.json -> record
VISION_FAMILIES: Mapping[str, VisionFamily] = {
    "qwen2_vl": QWEN,
}


def vision_family(config: Any) -> VisionFamily | None:
    """Return the record of a model by its config of transformers; None if there is none."""
    return VISION_FAMILIES.get(config.model_type)
