"""Random weights of a model directory that has a config.json, in the layout of published files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.trainer.devices import device_type

FILE_BYTES = 2 << 30
BLOCK = 128  # rows and columns that share a scale in FP8
MX_BLOCK = 32  # weights that share an exponent in MXFP4
DEVIATION = 0.02

Packer = Callable[[str, torch.Size, torch.device], dict[str, Tensor]]


def plain(name: str, shape: torch.Size, device: torch.device) -> dict[str, Tensor]:
    """Return a weight in bfloat16; vectors are ones, as of norms."""
    value = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return {name: value.fill_(1.0) if value.ndim == 1 else value.normal_(0, DEVIATION)}


def fp8_blocks(name: str, shape: torch.Size, device: torch.device) -> dict[str, Tensor]:
    """Return a matrix of a decoder layer in FP8, with scales of blocks; all else in bfloat16."""
    if len(shape) != 2 or ".layers." not in name:
        return plain(name, shape, device)
    codes = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 64)
    scales = torch.empty([-(-size // BLOCK) for size in shape], device=device)
    return {
        name: codes.clamp_(-448, 448).to(torch.float8_e4m3fn),
        f"{name}_scale_inv": scales.uniform_(0.5, 1.5) * (DEVIATION / 64),
    }


def mxfp4(name: str, shape: torch.Size, device: torch.device) -> dict[str, Tensor]:
    """Return a stack of experts' matrices in MXFP4, and all else in bfloat16."""
    if len(shape) != 3:
        return plain(name, shape, device)
    experts, inputs, outputs = shape
    blocks = (experts, outputs, inputs // MX_BLOCK)
    codes = torch.randint(256, (*blocks, MX_BLOCK // 2), dtype=torch.uint8, device=device)
    scales = torch.randint(119, 122, blocks, dtype=torch.uint8, device=device)
    return {f"{name}_blocks": codes, f"{name}_scales": scales}


FP8_SETTINGS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
# name -> how a weight is stored, and what config.json says of it
LAYOUTS: Mapping[str, tuple[Packer, Mapping[str, Any] | None]] = {
    "bfloat16": (plain, None),
    "fp8": (fp8_blocks, FP8_SETTINGS),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}),
}


def write_weights(directory: Path, layout: str = "bfloat16") -> int:
    """Write weights of the model of a config.json in several files; returns their bytes."""
    packer, settings = LAYOUTS[layout]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    files = Files(directory)
    device = torch.device(device_type())
    for name, tensor in stored_tensors(model).items():
        for part, value in packer(name, tensor.shape, device).items():
            files.add(part, value.cpu())
    if settings is not None:
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] = settings
        (directory / "config.json").write_text(json.dumps(config))
    return files.finish()


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a model, each tied weight once."""
    buffers = {name: value for name, value in model.named_buffers() if name in model.state_dict()}
    return dict(model.named_parameters()) | buffers


class Files:
    """Files of weights, of `FILE_BYTES` or a little more, and their index."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pending: dict[str, Tensor] = {}
        self._file_of: dict[str, str] = {}
        self._written = self._files = 0

    def add(self, name: str, value: Tensor) -> None:
        """Take a tensor, and write a file where there is enough for one."""
        self._pending[name] = value
        self._written += value.nbytes
        if sum(tensor.nbytes for tensor in self._pending.values()) >= FILE_BYTES:
            self._flush()

    def finish(self) -> int:
        """Write what is left, and the index; returns the bytes of all tensors."""
        if self._pending:
            self._flush()
        index = {"metadata": {"total_size": self._written}, "weight_map": self._file_of}
        (self._directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return self._written

    def _flush(self) -> None:
        file = f"model-{self._files:05d}.safetensors"
        save_file(self._pending, self._directory / file, metadata={"format": "pt"})
        self._file_of |= dict.fromkeys(self._pending, file)
        self._pending, self._files = {}, self._files + 1
