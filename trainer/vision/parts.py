"""The parts of a vision-language model by the paths of its family's record."""

from torch import nn

from headrace.trainer.vision.families import VisionFamily


class OwnParameters(nn.Module):
    """The parameters that lie at a module itself, without the modules below it; they are shared."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.__dict__["_parameters"] = owner._parameters


def vision_part(model: nn.Module, family: VisionFamily, path: str, prefix: str = "") -> nn.Module:
    """Return one of the parts of `VisionFamily.paths`.

    Args:
        prefix: before the model's own names.
    """
    part = model.get_submodule(prefix + path)
    return OwnParameters(part) if path == family.body else part
