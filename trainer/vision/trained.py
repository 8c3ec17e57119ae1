"""The vision tower and the projector in a tuning method: which of them is trained in full."""

from torch import nn

from headrace.schemas.train.adapter_config import AdapterConfig, VisionConfig
from headrace.trainer.vision.families import VisionFamily


def with_projector(
    adapter: AdapterConfig,
    wanted: VisionConfig | None,
    vision: VisionFamily | None,
    plain: nn.Module,
) -> AdapterConfig:
    """Return the adapter with the projector among the modules that are trained in full, if asked.

    Args:
        plain: the model without adapters.
    """
    if vision is None or wanted is None or not wanted.projector or adapter.record.trains_base:
        return adapter
    paths: list[str] = []
    for path in vision.projectors:
        part = plain.get_submodule(path)
        if isinstance(part, nn.ModuleList):
            paths += [f"{path}.{index}" for index in range(len(part))]
        else:
            paths.append(path)
    return adapter.model_copy(update={"modules_to_save": [*adapter.modules_to_save, *paths]})


def freeze_vision(model: nn.Module, wanted: VisionConfig, vision: VisionFamily) -> None:
    """Freeze those of tower and projector that full fine-tuning is not to train."""
    for name, parameter in model.named_parameters():
        trained = wanted.projector if vision.is_projector(name) else wanted.train
        if vision.is_vision(name) and not trained:
            parameter.requires_grad_(False)
