"""Quantized decoder layers on disk, a file for each, so that they are quantized once."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.publish import rename_durably
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.architecture.model_writer import save_tensors
from headrace.trainer.quantized.formats import FORMATS, format_of
from headrace.trainer.quantized.frozen_weight import FrozenWeight
from headrace.trainer.quantized.weight import QuantizedWeight

FORMAT = 3
META = "weights"  # in a file's metadata: name -> format, shape, settings and buffers of each


class QuantizedCache:
    """Layers of one model, quantized in one way.

    Files are published whole, under names that say what is in them; processes that quantize the
    same layer write the same file, and the last one stays.

    Args:
        folder: of the caches of all models.
        weights: fingerprint of the model's.
        compute_dtype, device: type of the computation, and kind of device that quantized.
    """

    def __init__(
        self,
        folder: Path,
        weights: str,
        config: QuantizationConfig,
        compute_dtype: str,
        device: str,
    ) -> None:
        key = {
            "format": FORMAT,
            "weights": weights,
            "quantization": config.model_dump(mode="json", exclude={"cache"}),
            "compute_dtype": compute_dtype,
            "device": device,
            "versions": {name: version(name) for name in (*format_of(config).packages, "torch")},
        }
        self.folder = folder / fingerprint(key)[:32]

    def load(self, layer: str, wanted: Sequence[str]) -> dict[str, QuantizedWeight] | None:
        """The quantized weights of a layer by name; None if they are not there.

        Raises:
            DataError: a file that is not whole.
        """
        path = self._path(layer, wanted)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                described = json.loads(file.metadata()[META])

                def read(name: str, kind: str, shape: Any, settings: Any, parts: Any) -> Any:
                    tensors = {key: file.get_tensor(f"{name}/{key}") for key in parts}
                    return FORMATS[kind](shape, tensors, settings)

                return {name: read(name, *described[name]) for name in wanted}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); remove it") from None

    def store(self, layer: str, weights: Mapping[str, FrozenWeight]) -> None:
        """Keep a layer's weights."""
        tensors: dict[str, torch.Tensor] = {}
        described: dict[str, list[object]] = {}
        for name, weight in weights.items():
            assert isinstance(weight, QuantizedWeight)
            buffers = weight.buffers_by_name
            described[name] = [weight.kernel, list(weight.shape), weight.settings, list(buffers)]
            for key, tensor in buffers.items():
                tensors[f"{name}/{key}"] = tensor.cpu().contiguous()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(layer, list(weights))
        temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
        save_tensors(tensors, temporary, {META: json.dumps(described)})
        rename_durably(temporary, path)

    def _path(self, layer: str, names: Sequence[str]) -> Path:
        """A stage may have half a layer, or train some of its weights."""
        return self.folder / f"{layer}.{fingerprint(sorted(names))[:8]}.safetensors"
