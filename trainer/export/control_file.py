"""Control adapters on disk: their tensors by layer."""

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from headrace.schemas.errors import ConfigError
from headrace.trainer.adapters.control import DIRECTIONS, STRETCHES, TENSORS_NAME
from headrace.trainer.adapters.names import CONTROL
from headrace.trainer.architecture.weight_index import read_header

NAME = re.compile(rf"\.(\d+)\.{CONTROL}\.{DIRECTIONS}$")


@dataclass(frozen=True)
class LayerControl:
    """The adapter of one decoder layer, in float64: see `ControlAdapter`."""

    layer: int
    directions: Tensor
    log_stretches: Tensor


def read_control(directory: Path) -> list[LayerControl]:
    """The adapters of a run's `adapter` directory, by layer.

    Raises:
        ConfigError, DataError: there are none, or their file is damaged.
    """
    path = directory / TENSORS_NAME
    if not path.is_file():
        raise ConfigError(
            f"{path}: not found; give the `adapter` directory of a run with adapter.kind = "
            '"control"'
        )
    read_header(path)  # tells what is wrong with it in one line
    tensors = load_file(path)
    found = []
    for name, directions in tensors.items():
        if match := NAME.search(name):
            stretches = tensors[name.removesuffix(DIRECTIONS) + STRETCHES]
            found.append(LayerControl(int(match[1]), directions.double(), stretches.double()))
    if not found:
        raise ConfigError(f"{path}: holds no control adapter; train one again")
    return sorted(found, key=lambda control: control.layer)
