"""A Hugging Face model directory, written piece by piece: weights in files of limited size, an
index over them, config and tokenizer.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from headrace.schemas.publish import write_atomic
from headrace.schemas.shards.tokenizer_content import with_tokens
from headrace.trainer.architecture.model_files import INDEX_NAME
from headrace.trainer.architecture.weight_names import as_stored, kept_in_float32
from headrace.trainer.families.remote_code import has_code
from headrace.trainer.families.score import is_scored

OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as safetensors ends its messages
FILE_BYTES = 5 * 10**9  # transformers' own limit
OVERRIDDEN = ("vocab_size", "max_position_embeddings", "rope_parameters")
GENERATION_NAME, TOKENIZER_NAME = "generation_config.json", "tokenizer.json"
COPIED = (
    GENERATION_NAME,
    TOKENIZER_NAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)


PROCESSOR_FILES = (  # of pictures
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


def part_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def file_count(sizes: Sequence[int]) -> int:
    """Files that `ModelWriter` makes of parts of these sizes."""
    count, filled = 0, 0
    for size in sizes:
        if not count or filled + size > FILE_BYTES:
            count, filled = count + 1, 0
        filled += size
    return count


def as_saved(skeleton: Any, values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return weights in the type that they are saved in, on the CPU; those that transformers keeps
    in float32 stay so.
    """
    in_float32 = kept_in_float32(skeleton, dtype)
    return {
        name: value.to("cpu", torch.float32 if in_float32(name) else dtype).contiguous()
        for name, value in values.items()
    }


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: as any file; the library's own error tells the number in its text alone.
    """
    path.touch()  # with the mode that the umask gives; the library would give its own, 0600
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
        path.chmod(mode)
    except SafetensorError as error:
        number = OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


class ModelWriter:
    """Collects whole modules and writes a file whenever the next would not fit.

    Args:
        skeleton: the model without adapters, which knows how checkpoints name and lay out weights.
        before: number of the first file, from 0.
        total: of all files, for their names.
    """

    def __init__(self, directory: Path, skeleton: Any, before: int, total: int) -> None:
        self.directory = directory
        self.skeleton = skeleton
        self.number = before
        self.total = total
        self._waiting: dict[str, Tensor] = {}
        self._filled = 0
        self._written: dict[str, dict[str, int]] = {}

    def add(self, tensors: dict[str, Tensor], size: int) -> None:
        """One module's parameters, under the skeleton's names; `size` as given to `file_count`."""
        if self._waiting and self._filled + size > FILE_BYTES:
            self._write()
        for name, tensor in as_stored(self.skeleton, tensors).items():
            self._waiting[name] = tensor.contiguous()
        self._filled += size

    def finish(self) -> dict[str, dict[str, int]]:
        """Write what waits. Returns file name -> tensor name -> bytes."""
        if self._waiting:
            self._write()
        return self._written

    def _write(self) -> None:
        name = part_name(self.number, self.total)
        save_tensors(self._waiting, self.directory / name, {"format": "pt"})
        self._written[name] = {key: tensor.nbytes for key, tensor in self._waiting.items()}
        self.number, self._waiting, self._filled = self.number + 1, {}, 0


def write_index(directory: Path, files: Mapping[str, Mapping[str, int]]) -> None:
    """The index that says which file holds which tensor.

    Args:
        files: file name -> tensor name -> bytes.
    """
    weight_map = {name: file for file, sizes in files.items() for name in sizes}
    size = sum(sum(sizes.values()) for sizes in files.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_atomic(directory / INDEX_NAME, json.dumps(index, indent=1) + "\n")


def write_tokenizer(model: Path, directory: Path, tokens: Sequence[str]) -> None:
    """Write the tokenizer of a model with new tokens, if it has any."""
    if not tokens:
        return
    for name in COPIED:
        if name not in (GENERATION_NAME, TOKENIZER_NAME) and (model / name).is_file():
            shutil.copy2(model / name, directory / name)
    content, _ = with_tokens((model / TOKENIZER_NAME).read_bytes(), tokens)
    write_atomic(directory / TOKENIZER_NAME, content.decode())


def overridden_keys(model: Path, config: Any) -> list[str]:
    """Return the settings that `[model_overrides]` has changed in a config."""
    base = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    return [key for key in OVERRIDDEN if getattr(base, key, None) != getattr(config, key, None)]


def copy_files(model: Path, directory: Path, names: Sequence[str]) -> None:
    """Copy those files of a model directory that are there."""
    for name in names:
        if (model / name).is_file():
            shutil.copy2(model / name, directory / name)


def copy_model_files(
    model: Path, directory: Path, skeleton: Any, dtype: torch.dtype | None = None
) -> None:
    """Config, generation config and tokenizer.

    The base model's config.json is kept as it is, but for what it says of quantized weights, unless
    the model was changed or is the text part of a larger one.

    Args:
        dtype: of the weights, where it may differ from the base model's.
    """
    copy_files(model, directory, COPIED)
    if has_code(model):
        copy_files(model, directory, [path.name for path in model.glob("*.py")])
    if skeleton.config.get_text_config() is not skeleton.config:  # with its vision tower
        copy_files(model, directory, PROCESSOR_FILES)
    base, config = json.loads((model / "config.json").read_text(encoding="utf-8")), skeleton.config
    unchanged = base.get("model_type") == config.model_type and all(
        base.get(key, own) == own
        for key, own in (
            ("num_hidden_layers", config.get_text_config().num_hidden_layers),
            ("tie_word_embeddings", config.tie_word_embeddings),
        )
    )
    unchanged = unchanged and not is_scored(skeleton) and not overridden_keys(model, config)
    quantized = {"quantization_config", "compression_config"} & base.keys()
    if unchanged and quantized:
        kept = {key: value for key, value in base.items() if key not in quantized}
        write_atomic(directory / "config.json", json.dumps(kept, indent=2) + "\n")
        dtype = dtype or config.dtype
    elif unchanged:
        shutil.copy2(model / "config.json", directory / "config.json")
    else:
        config.architectures = [type(skeleton).__name__]
        config.save_pretrained(directory)
    if dtype is not None and (quantized or dtype != getattr(config, "dtype", None)):
        path = directory / "config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop("torch_dtype", None)
        values["dtype"] = str(dtype).removeprefix("torch.")
        write_atomic(path, json.dumps(values, indent=2) + "\n")
