"""Selection of the weights to hold quantized, and their formats."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headrace.kernels.fp8.linear import ALIGNMENT
from headrace.schemas.errors import ConfigError
from headrace.schemas.train.model_config import ModelConfig
from headrace.schemas.train.quantization_config import QuantizationConfig, check_installed
from headrace.trainer import devices
from headrace.trainer.architecture.architecture import Architecture
from headrace.trainer.architecture.families_state import is_bypassed
from headrace.trainer.architecture.weight_index import stored_tensors
from headrace.trainer.architecture.weight_names import CheckpointNames
from headrace.trainer.quantized.formats import format_of
from headrace.trainer.quantized.frozen_weight import Cut
from headrace.trainer.quantized.modules import (
    QuantizableModule,
    QuantizedEmbedding,
    QuantizedLinear,
)
from headrace.trainer.quantized.weight import QuantizedWeight
from headrace.trainer.stored.bnb import Bnb
from headrace.trainer.stored.formats import stored_format

USUAL_HEAD = "lm_head"  # skipped by default, also in models whose head has another name
FP8_CAPABILITY = (8, 9)  # Ada; Hopper has 9.0
LINEAR_TYPES = ("Linear", "FalconLinear")  # the second is nn.Linear in another order of rounding


@dataclass(frozen=True)
class Quantization:
    """Rules by which a model's frozen weights are quantized.

    `stored` names the weights that the model's files hold quantized; None: quantize at loading.
    """

    config: QuantizationConfig
    stored: frozenset[str] | None = None

    def wants(self, name: str, module: nn.Linear) -> bool:
        """Return whether a linear layer of this name, without adapters, is quantized."""
        if self.stored is not None:
            return f"{name}.weight" in self.stored
        return (
            not self._skips(name) and module.out_features > 1
        )  # gates of a single output are kept

    def wants_experts(self, name: str) -> bool:
        """Return whether the fused experts of this name are quantized."""
        return self.config.experts and self.stored is None and not self._skips(name)

    def _skips(self, name: str) -> bool:
        """Return whether the config leaves out a module of this name."""
        return any(part in name for part in self.config.skip_modules)

    def make(self, value: Tensor, name: str, dtype: torch.dtype) -> QuantizedWeight:
        """Quantize a matrix, or a stack of experts' matrices, where it lies."""
        kind = format_of(self.config)
        make = kind.make if value.ndim == 2 else kind.make_stack
        made: QuantizedWeight = make(value, name, self.config, dtype)
        if self.config.in_fp8:
            made.multiply_in_fp8()
        return made

    def check_part(self, name: str, shape: torch.Size, cut: Cut) -> None:
        """Check that ranks can hold their parts of a weight.

        Raises:
            ConfigError: naming it.
        """
        if self.config.in_fp8:
            part = [n // cut.ranks if dim == cut.dim else n for dim, n in enumerate(shape)]
            check_fp8_shape(f"a part of {name}", torch.Size(part))
        format_of(self.config).check_part(name, shape, cut.dim, cut.ranks, self.config)

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of the computation, given that of the run."""
        wished = self.config.compute_dtype
        return dtype if wished == "auto" else getattr(torch, wished)

    def bits(self, name: str, shape: torch.Size) -> float:
        """Return the bits that a weight takes, its share of scales included.

        Raises:
            ConfigError: settings that do not go with its shape.
        """
        kind = format_of(self.config)
        bits = kind.bits(name, shape, self.config)
        if self.config.in_fp8:
            check_fp8_shape(name, shape)
            bits += kind.product_bits(shape)
        return bits


def check_fp8_device(config: ModelConfig, device: torch.device) -> None:
    """Check that a GPU has matrix units for 8-bit floats, where they are asked for.

    Raises:
        ConfigError: naming the GPU and what to use instead.
    """
    frozen = config.quantization is not None and config.quantization.in_fp8
    capability = devices.compute_capability(device)
    if capability is None or not (frozen or config.trained_matmul == "fp8"):
        return
    if capability < FP8_CAPABILITY:
        key = "quantization" if frozen else "trained_matmul"
        raise ConfigError(
            f"{key}: {devices.device_name(device)} has no matrix units for 8-bit floats "
            f"(compute capability {capability[0]}.{capability[1]}, needed is 8.9); use "
            + ('backend = "bnb" without matmul = "fp8"' if frozen else 'trained_matmul = "auto"')
        )


def check_fp8_shape(name: str, shape: torch.Size) -> None:
    """Check that the matrix units can multiply with a weight of this shape.

    Raises:
        ConfigError: naming the weight.
    """
    if any(size % ALIGNMENT for size in shape[-2:]):
        raise ConfigError(
            f"quantization in 8-bit floats: {name} is {' x '.join(map(str, shape[-2:]))}, which "
            f"are not multiples of {ALIGNMENT}; add it to skip_modules"
        )


def plan_quantization(
    config: ModelConfig, directory: Path, plain: nn.Module
) -> Quantization | None:
    """Return the quantization that the config asks for, or that the model's files have.

    Only bitsandbytes' weights are held as the files have them, and only where the config asks for
    nothing else and adapters alone are trained; all others are dequantized as they are read.

    Raises:
        ConfigError: a library that is missing, or files of a format that is not read.
    """
    held = stored_format(directory)
    if isinstance(held, Bnb):
        check_installed("bnb")
    if config.quantization is not None:
        check_installed(config.quantization.backend)
        return Quantization(config.quantization)
    if not isinstance(held, Bnb) or not config.adapter.record.has_products:
        return None
    if config.weights == "random":
        return Quantization(stored_config(held.settings))
    files = stored_tensors(directory)
    quantized = held.weights(files)
    names = CheckpointNames(plain, [name for name in files if name in quantized])
    whole = {
        name
        for name in dict(plain.named_parameters())
        if name in names and len(names.stored(name)) == 1
    }
    return Quantization(stored_config(held.settings), frozenset(whole))


def stored_config(values: Mapping[str, Any]) -> QuantizationConfig:
    """Our settings for `quantization_config` in config.json."""
    if values.get("load_in_8bit"):
        return QuantizationConfig(backend="bnb", type="int8")
    return QuantizationConfig(
        backend="bnb",
        type=values.get("bnb_4bit_quant_type") or "fp4",
        double_quantization=bool(values.get("bnb_4bit_use_double_quant")),
    )


def install_holders(
    model: nn.Module, quantization: Quantization | None, architecture: Architecture
) -> nn.Module:
    """Put modules that can hold quantized weights in the place of those that are to; in place.

    Args:
        model: without adapters, on the meta device.

    Raises:
        ConfigError: a kind of module that has no such form, or settings that do not fit a weight.
    """
    if quantization is None:
        return model
    check_skipped(model, quantization, architecture)
    wanted = dict(selected(model, quantization, architecture))
    weights: list[str] = []
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            name = f"{parent_name}.{child_name}".lstrip(".")
            holder: QuantizableModule | None = None
            if is_table(name, architecture):
                if quantization.config.embedding and quantization.stored is None:
                    holder = _holder_of_table(child, name)
            elif name in wanted:
                holder = _holder_of(child, name, quantization.config.int8_threshold)
            if holder is not None:
                holder.bits = {
                    attribute: quantization.bits(
                        f"{name}.{attribute}", holder.as_held(getattr(child, attribute)).shape
                    )
                    for attribute in holder.weights
                }
                setattr(parent, child_name, holder)
                weights += [f"{name}.{attribute}" for attribute in holder.weights]
    if not weights:
        raise ConfigError(
            f"quantization.skip_modules = {quantization.config.skip_modules}: nothing is left "
            "to quantize"
        )
    check_overrides(weights, quantization.config)
    return model


def check_skipped(model: nn.Module, quantization: Quantization, architecture: Architecture) -> None:
    """Check that each entry of `skip_modules` keeps some module from being quantized.

    Raises:
        ConfigError: naming one that does not, and the names of the modules that may be skipped.
    """
    config = quantization.config
    everything = replace(quantization, config=config.model_copy(update={"skip_modules": []}))
    names = [name for name, _ in selected(model, everything, architecture)]
    for part in config.skip_modules:
        if part != USUAL_HEAD and not any(part in name for name in names):
            ends = sorted({name.split(".")[-1] for name in names})
            raise ConfigError(
                f'quantization.skip_modules: no module that would be quantized has "{part}" in its '
                f"name, so that it has no effect; drop it, or name some of {', '.join(ends)}"
            )


def check_overrides(weights: Sequence[str], config: QuantizationConfig) -> None:
    """Check that each entry of `dynamic_config` is in the name of a quantized weight.

    Raises:
        ConfigError: naming one that is not, and the names of the modules that there are.
    """
    for part in config.dynamic_config:
        if not any(part in name for name in weights):
            ends = sorted({name.split(".")[-2] for name in weights})
            raise ConfigError(
                f'quantization.dynamic_config: no quantized weight has "{part}" in its name; '
                f"modules with such weights end in {', '.join(ends)}"
            )


def selected(
    model: nn.Module, quantization: Quantization, architecture: Architecture
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers and experts that are quantized, without the tables of embeddings, and
    without layers that are not called.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if architecture.vision is not None and architecture.vision.is_vision(name):
            continue
        if is_table(name, architecture) or is_bypassed(name, architecture.config.model_type):
            continue
        if isinstance(module, nn.Linear):
            wanted = quantization.wants(name, module)
        else:
            wanted = isinstance(module, QuantizableModule) and quantization.wants_experts(name)
        if wanted:
            yield name, module


def is_table(name: str, architecture: Architecture) -> bool:
    """Return whether a module is the embedding, or the head that is tied to it."""
    family = architecture.family
    return name == family.embedding or (name == family.head and architecture.tied)


def _holder_of_table(module: nn.Module, name: str) -> QuantizableModule:
    """Return the quantizable module for an embedding, or the head that is tied to it."""
    if isinstance(module, nn.Linear):
        return _holder_of_linear(module, name, None)
    scaled = type(module) is nn.Embedding or hasattr(module, "scalar_embed_scale")
    if not isinstance(module, nn.Embedding) or not scaled:
        raise ConfigError(
            f"quantization.embedding: {name} is a {type(module).__name__}, which cannot be "
            "quantized; set it to false"
        )
    return QuantizedEmbedding(module)


def _holder_of(module: nn.Module, name: str, threshold: float | None) -> QuantizableModule:
    """Return the quantizable module for a layer; experts are in their place already."""
    if isinstance(module, QuantizableModule):
        return module
    assert isinstance(module, nn.Linear)
    return _holder_of_linear(module, name, threshold)


def _holder_of_linear(module: nn.Linear, name: str, threshold: float | None) -> QuantizableModule:
    if type(module).__name__ not in LINEAR_TYPES:
        raise ConfigError(
            f"quantization: {name} is a {type(module).__name__}, which cannot be quantized; "
            "add it to skip_modules"
        )
    return QuantizedLinear(module, threshold)
