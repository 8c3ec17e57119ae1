"""A tuning method: one object that is asked for all that depends on what is trained."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.trainer.architecture.architecture import Architecture


class TuningMethod:
    """One way to train a model; this base class trains nothing.

    Args:
        architecture: of the model that is trained, as `reshape` returned it.
        plain: that model without adapters, on the meta device.
        model: name of the base model.
        seed: of the run.

    Attributes:
        prefix: put before the model's own names.
        peft: the adapters in PEFT's terms, where it has them.
        in_halves: works on halves of decoder layers too.
        beside_hidden: works where layers hand on more than hidden states.

    Raises:
        ConfigError: layers or parts that the model does not have.
    """

    prefix = ""
    peft: LoraConfig | None = None
    in_halves = True
    beside_hidden = True

    def __init__(
        self,
        config: AdapterConfig,
        architecture: Architecture,
        plain: nn.Module,
        model: str,
        seed: int,
    ) -> None:
        self.config = config
        self.architecture = architecture
        self.plain = plain
        self.model = model
        self.seed = seed

    @classmethod
    def reshape(cls, config: AdapterConfig, model_config: Any) -> Any:
        """Return transformers' config of the model that is trained, given the base model's."""
        return model_config

    @property
    def trains_base(self) -> bool:
        """Return whether the model's own weights are trained, and a whole model is written."""
        return self.config.record.trains_base

    @property
    def trains_all(self) -> bool:
        """Return whether these are all of its weights, unless the config names some."""
        return self.config.record.trains_all

    def install(self, model: nn.Module) -> nn.Module:
        """Put adapters into a model without memory, and mark what is trained.

        Returns:
            The model, or a wrapper around it.

        Raises:
            ConfigError: targets that match nothing, or that cannot be trained.
        """
        raise NotImplementedError

    def check_result(self) -> None:
        """Check that what is written will be read as it is.

        Raises:
            ConfigError: naming what to leave out.
        """

    def stored_name(self, name: str) -> str:
        """Return the base model's name for a parameter or buffer of the trained model."""
        return name

    def started(self, name: str) -> Tensor | None:
        """Return what a weight of the model starts from in place of its value in files, if set."""
        return None

    def starts_at_zero(self, name: str) -> bool:
        """Return whether a weight of the model starts at zero in place of its value in files."""
        return False

    def adapters(self, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules below named ones that have adapters, with their whole names."""
        yield from ()

    def taking_over(self, modules: Mapping[str, nn.Module]) -> dict[int, tuple[str, nn.Module]]:
        """Return adapters that start from frozen weights, by the id of the weight's module."""
        return {}

    def measuring(self, modules: Mapping[str, nn.Module]) -> dict[int, tuple[str, nn.Module]]:
        """Return adapters whose initial values are sizes of whole frozen weights, by the id of the
        weight's module.
        """
        return {}

    def initial_values(self, name: str, adapted: nn.Module) -> dict[str, Tensor]:
        """Return an adapter's initial values, by name below its module: the same in every layout.

        What adapters take over is taken out of the frozen weights here.
        """
        return {}

    @property
    def compensates(self) -> bool:
        """Return whether adapters take over what frozen weights lose when they are quantized."""
        return False

    def compensating_values(self, name: str, adapted: nn.Module, lost: Tensor) -> dict[str, Tensor]:
        """Return initial values that make up for a difference.

        Args:
            lost: [outputs, inputs] of the frozen weight.
        """
        raise NotImplementedError

    def keeps(self, part: str) -> bool:
        """Return whether exporting needs the initial values of a part of an adapter."""
        return False

    def after_step(self, modules: Mapping[str, nn.Module], lr: float) -> None:
        """Change what is trained once more, after an optimizer step with this learning rate."""

    def write(self, directory: Path, tensors: dict[str, Tensor], width: int, base: Path) -> None:
        """Write adapters as others read them, from all their tensors by the names in files.

        Args:
            width: their rank as a multiple of the trained ones'.
            base: directory of the base model.
        """
        raise NotImplementedError


def decoder_layers(architecture: Architecture, model: Any) -> nn.Module:
    """Return the list of a model's decoder layers."""
    layers: nn.Module = model.get_submodule(architecture.family.layers)
    return layers
