"""The families of vision-language models, each a small record over transformers' own modules.

A record says where a model keeps its parts, how its tower is given pictures, and what its decoder
layers ask of them. Read against transformers 5.23. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.schemas.errors import ConfigError


@dataclass(frozen=True)
class VisionFamily:
    """A model of tower, projector and language model. Paths are relative to the whole model."""

    arrangement: str  # of pictures in what the tower is given, one of `ARRANGEMENTS`
    body: str = "model"  # whose `get_image_features` runs tower and projector
    tower: str = "model.vision_tower"
    projectors: tuple[str, ...] = ("model.multi_modal_projector",)  # inside the tower, maybe
    language: str = "model.language_model"
    parameters: tuple[str, ...] = ()  # of the projector that lie at the body itself
    three_axes: bool = False  # rotary positions in time, height and width
    two_way: bool = False  # tokens of a picture see each other both ways
    marks: str | None = None  # argument of the model that tells tokens of pictures from others
    stacked: bool = False  # features of the tower are added again after the first decoder layers
    bounded: bool = False  # the tower attends within `cu_seqlens`, and may be given them

    @property
    def modules(self) -> list[str]:
        """Paths of tower and projector, each once."""
        inside = f"{self.tower}."
        return [self.tower, *(path for path in self.projectors if not path.startswith(inside))]

    @property
    def paths(self) -> list[str]:
        """Paths of all that has weights; the body's stands for its own parameters alone."""
        return [*self.modules, *([self.body] if self.parameters else [])]

    def is_projector(self, name: str) -> bool:
        """Return whether a weight of this name, in the whole model, is the projector's."""
        return is_inside(name, self.projectors) or self._is_own(name)

    def is_vision(self, name: str) -> bool:
        """Return whether a module or weight of this name is the tower's or the projector's."""
        return is_inside(name, self.modules) or self._is_own(name)

    def _is_own(self, name: str) -> bool:
        return name in {f"{self.body}.{parameter}" for parameter in self.parameters}


def is_inside(name: str, paths: Sequence[str]) -> bool:
    """Return whether a name is one of these paths, or of a part below one."""
    return f"{name}.".startswith(tuple(f"{path}." for path in paths))


QWEN = VisionFamily(
    "patches",
    tower="model.visual",
    projectors=("model.visual.merger",),
    three_axes=True,
    marks="mm_token_type_ids",
    bounded=True,
)
QWEN_3 = replace(
    QWEN, projectors=(*QWEN.projectors, "model.visual.deepstack_merger_list"), stacked=True
)
IDEFICS_3 = VisionFamily(
    "tiles of one row",
    tower="model.vision_model",
    projectors=("model.connector",),
    language="model.text_model",
)
# name of a family -> record; names are those of `schemas.vision`
VISION_FAMILIES: Mapping[str, VisionFamily] = {
    "gemma3": VisionFamily("tiles", two_way=True, marks="token_type_ids"),
    "idefics3": IDEFICS_3,
    "internvl": VisionFamily("tiles"),
    "llava": VisionFamily("tiles"),
    "llava_next": VisionFamily("tiles with sizes", parameters=("image_newline",)),
    "mistral3": VisionFamily("padded"),
    "pixtral": VisionFamily("padded"),
    "qwen2_5_vl": QWEN,
    "qwen2_vl": QWEN,
    "qwen3_vl": QWEN_3,
    "qwen3_vl_moe": QWEN_3,
    "smolvlm": IDEFICS_3,
}


def vision_family(path: str, model_type: str, tower_type: str | None) -> VisionFamily:
    """Return the record of a type of models, whose tower may be of another family.

    Raises:
        ConfigError: there is none.
    """
    if model_type == "llava" and tower_type == "pixtral":
        return VISION_FAMILIES["pixtral"]
    if model_type not in VISION_FAMILIES:
        known = ", ".join(sorted(VISION_FAMILIES))
        raise ConfigError(
            f'{path}: [vision]: model_type "{model_type}" is not supported with pictures; '
            f"supported: {known}. Drop [vision] to train its text part"
        )
    return VISION_FAMILIES[model_type]
