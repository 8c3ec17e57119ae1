"""Full fine-tuning: the model's own weights, or those parts and layers that the config names."""

from torch import nn

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.trainer.adapters.method import TuningMethod
from headrace.trainer.adapters.names import names_of
from headrace.trainer.adapters.pattern_checks import unmatched
from headrace.trainer.adapters.targets import adapter_layers


class FullTuning(TuningMethod):
    """Training of the weights themselves."""

    def install(self, model: nn.Module) -> nn.Module:
        layers = self.architecture.layers
        select_trained(model, self.config, self.architecture.family.layers, layers)
        return model


def select_trained(
    model: nn.Module, adapter: AdapterConfig, layer_prefix: str, layers: int
) -> None:
    """Freeze what full fine-tuning is not to train. What transformers freezes, such as the biases
    by which Ernie's routers choose, stays so.

    Args:
        layer_prefix: path of the list of decoder layers.

    Raises:
        ConfigError: nothing is left to train.
    """
    wanted, parts = adapter_layers(adapter, layers), adapter.target_modules
    prefixes = None if wanted is None else tuple(f"{layer_prefix}.{index}." for index in wanted)
    free = {id(p) for p in model.parameters() if p.requires_grad}  # transformers may freeze some
    model.requires_grad_(False)
    names = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        in_parts = parts == "all-linear" or any(part in name for part in parts)
        in_layers = prefixes is None or name.startswith(prefixes)
        named = parts != "all-linear" and not name.startswith(f"{layer_prefix}.")
        if id(parameter) in free and in_parts and (in_layers or named):
            parameter.requires_grad_(True)
            names.append(name)
    missing = [] if parts == "all-linear" else [p for p in parts if not any(p in n for n in names)]
    if not names and not missing:
        raise ConfigError(
            f"adapter.target_modules = {parts}: nothing is left to train; name a part"
        )
    if missing:
        known = {part for name in names_of(model) for part in name.split(".") if not part.isdigit()}
        raise unmatched("adapter.target_modules", missing, known)
