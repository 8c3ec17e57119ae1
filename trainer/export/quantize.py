"""A model directory in fewer bits, in compressed-tensors' format, which servers load."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from headrace.schemas.errors import ConfigError
from headrace.schemas.progress import Progress, silent
from headrace.schemas.publish import write_atomic
from headrace.trainer.adapters.linear_layers import linear_layers
from headrace.trainer.architecture.model_files import StoredTensor
from headrace.trainer.architecture.model_writer import COPIED, save_tensors, write_index
from headrace.trainer.architecture.read_architecture import lay_out, read_architecture
from headrace.trainer.architecture.weight_index import stored_tensors, weight_files
from headrace.trainer.architecture.weight_names import CheckpointNames
from headrace.trainer.export.model_card import CARD, CURVE
from headrace.trainer.export.output import check_new, new_output
from headrace.trainer.export.packer import Packer
from headrace.trainer.quiet import quiet_libraries

# name of ours -> the library's
SCHEMES = {
    "fp8": "FP8_DYNAMIC",
    "fp8-block": "FP8_BLOCK",
    "int8": "W8A8",
    "int4": "W4A16",
    "nvfp4": "NVFP4A16",
    "mxfp4": "MXFP4A16",
}
EXPERTS = ".experts."
# weights that servers join into one, which then has one scale
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
GROUPED, GROUPS = "int4", (128, 64, 32)
ROUTERS = ("gate", "router", "shared_expert_gate")
SINGLE = ".safetensors"


@dataclass
class Quantized:
    """A summary of what was written.

    Attributes:
        weights: how many are in fewer bits.
        kept: linear layers that are as they were, since their inputs are no multiple of a group.
        before, after: bytes of all tensors.
        error: largest norm of a weight's change over its own.
    """

    weights: int = 0
    kept: list[str] = field(default_factory=list)
    before: int = 0
    after: int = 0
    error: float = 0.0


def quantize(
    model: Path, output: Path, name: str, device: str = "cpu", progress: Progress = silent
) -> Quantized:
    """Write a model directory whose linear layers, but for head and routers, are in fewer bits.

    Args:
        model: of whole weights in safetensors; adapters are merged before.
        name: one of `SCHEMES`.
        device: where weights are rounded; one is there at once.

    Raises:
        ConfigError: a model that is quantized already, or holds more than a language model.
        DataError: damaged files.
    """
    check_new(output)
    quiet_libraries()
    packer, chosen, ignored = choose(model, name)
    result = Quantized(kept=ignored[1:])
    extremes = shared_extremes(model, chosen) if packer.shares_scales else {}
    with new_output(output) as temporary:
        temporary.mkdir()
        files = weight_files(model)
        index = {}
        for path in progress(files, [file.stat().st_size for file in files], "quantize"):
            tensors = dict(converted(path, chosen, packer, extremes, device, result))
            save_tensors(tensors, temporary / path.name, {"format": "pt"})
            index[path.name] = {key: tensor.nbytes for key, tensor in tensors.items()}
        if len(files) > 1:
            write_index(temporary, index)
        write_settings(model, temporary, packer.settings(ignored))
    return result


def choose(model: Path, name: str) -> tuple[Packer, set[str], list[str]]:
    """Return the scheme, the stored tensors to quantize, and the linear layers to leave alone.

    Raises:
        ConfigError: a directory that cannot be quantized.
    """
    packer = Packer(SCHEMES[name])
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if {"quantization_config", "compression_config"} & config.keys():
        raise ConfigError(f"{model}: quantized already; give a model of whole weights")
    stored = stored_tensors(model)
    if any(tensor.path.suffix != SINGLE for tensor in stored.values()):
        raise ConfigError(f"{model}: no safetensors; `headrace merge` writes them")
    architecture = read_architecture(model)
    skeleton: Any = lay_out(architecture)
    if config.get("model_type") != architecture.config.model_type:
        raise ConfigError(f"{model}: holds more than a language model, which alone is quantized")
    names = CheckpointNames(skeleton, stored)
    linears = {
        f"{path}.weight": module
        for path, module in linear_layers(skeleton)
        if isinstance(module, nn.Linear)  # GPT-2's lie the other way round
    }
    if name == GROUPED:
        packer = Packer(SCHEMES[name], group_size=group_size(linears.values()))
    fitting = {
        weight: packer.fits(module.in_features) and not is_router(weight.removesuffix(".weight"))
        for weight, module in linears.items()
    }
    kept = [
        "lm_head",
        *(path.removesuffix(".weight") for path, fits in fitting.items() if not fits),
    ]
    chosen = {stem for path, fits in fitting.items() if fits for stem in names.stored(path)}
    chosen.update(expert_names(stored, packer))
    if not chosen:
        raise ConfigError(f"{model}: no linear layer of it can be held in this format")
    return packer, chosen, kept


def group_size(linears: Iterable[nn.Linear]) -> int:
    """Return the largest size of groups into which the inputs of all layers fall."""
    widths = {module.in_features for module in linears}
    whole = [size for size in GROUPS if all(width % size == 0 for width in widths)]
    return (whole or [GROUPS[0]])[0]


def shared_extremes(model: Path, chosen: set[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for each weight the smallest and largest value of those that it is joined with."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path in weight_files(model):
        with safe_open(path, "pt") as file:
            for name in chosen & set(file.keys()):
                value = file.get_tensor(name).bfloat16()
                low, high = found.get(joined(name), (value.min(), value.max()))
                found[joined(name)] = (min(low, value.min()), max(high, value.max()))
    return {name: found[joined(name)] for name in chosen}


def joined(name: str) -> str:
    """Return one name for all weights that are joined."""
    parent, last, *_ = name.rsplit(".", 2)
    return next((f"{parent}.{'+'.join(group)}" for group in JOINED if last in group), name)


def is_router(path: str) -> bool:
    """Return whether a linear layer weighs experts; routers of a class of their own are none."""
    return path.rsplit(".", 1)[-1] in ROUTERS


def expert_names(stored: Mapping[str, StoredTensor], packer: Packer) -> Iterator[str]:
    """Yield the weights of experts that are stored one by one.

    Raises:
        ConfigError: they are stored as one tensor, which the format has no place for.
    """
    for name, tensor in stored.items():
        if EXPERTS not in name or name.endswith("bias"):
            continue
        if len(tensor.shape) != 2:
            raise ConfigError(f"{name}: experts in one tensor; the format has them one by one")
        if name.endswith(".weight") and packer.fits(tensor.shape[1]):
            yield name


def converted(
    path: Path,
    chosen: set[str],
    packer: Packer,
    extremes: Mapping[str, tuple[Tensor, Tensor]],
    device: str,
    result: Quantized,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one file, those chosen in fewer bits; counts go into `result`."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            value = file.get_tensor(name)
            result.before += value.nbytes
            parts = {name: value}
            if name in chosen:
                weight = value.to(device)
                packed = packer.pack(name, weight, extremes.get(name))
                result.weights += 1
                result.error = max(result.error, change(weight, packer.unpack(name, packed)))
                parts = {key: part.cpu() for key, part in packed.items()}
            result.after += sum(part.nbytes for part in parts.values())
            yield from parts.items()


def change(weight: Tensor, other: Tensor) -> float:
    """Return the norm of a weight's change over its own."""
    norm = weight.float().norm()
    return float((weight.float() - other.float()).norm() / norm) if norm else 0.0


def write_settings(model: Path, output: Path, settings: Mapping[str, Any]) -> None:
    """Write config.json with what it says of the weights, and copy all that lies beside it."""
    for name in (*COPIED, CARD, CURVE):
        if (model / name).is_file():
            shutil.copy2(model / name, output / name)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = dict(settings)
    write_atomic(output / "config.json", json.dumps(config, indent=2) + "\n")


def describe(result: Quantized) -> str:
    """Return a line about what was written."""
    kept = f", {len(result.kept)} linear layers kept as they are" if result.kept else ""
    return (
        f"{result.weights} weights{kept}; {result.after / 2**30:.2f} GiB of "
        f"{result.before / 2**30:.2f}; largest relative change {result.error:.3f}"
    )
