"""Control adapters on disk: their tensors by layer, and what they were made by."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from headrace.schemas.errors import ConfigError
from headrace.schemas.publish import write_atomic
from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.trainer.adapters.control import CONTROL, DIRECTIONS, STRETCHES

TENSORS_NAME, RECORD_NAME = "control_adapter.safetensors", "control_adapter.json"
SETTINGS = {"kind", "rank", "layers"}
NAME = re.compile(rf"\.(\d+)\.{CONTROL}\.{DIRECTIONS}$")


@dataclass(frozen=True)
class LayerControl:
    """The adapter of one decoder layer, in float64: see `ControlAdapter`."""

    layer: int
    directions: Tensor
    log_stretches: Tensor


def write_record(directory: Path, config: AdapterConfig, model: str) -> None:
    """Write the settings that stand beside the tensors.

    Not in PEFT's format, which has none for them.
    """
    record = {"base_model": model, **config.model_dump(include=SETTINGS)}
    write_atomic(directory / RECORD_NAME, json.dumps(record, indent=1) + "\n")


def read_control(directory: Path) -> list[LayerControl]:
    """The adapters of a run's `adapter` directory, by layer.

    Raises:
        ConfigError: there are none.
    """
    path = directory / TENSORS_NAME
    if not path.is_file():
        raise ConfigError(
            f"{path}: not found; give the `adapter` directory of a run with adapter.kind = "
            '"control"'
        )
    tensors = load_file(path)
    found = []
    for name, directions in tensors.items():
        if match := NAME.search(name):
            stretches = tensors[name.removesuffix(DIRECTIONS) + STRETCHES]
            found.append(LayerControl(int(match[1]), directions.double(), stretches.double()))
    if not found:
        raise ConfigError(f"{path}: holds no control adapter; train one again")
    return sorted(found, key=lambda control: control.layer)
