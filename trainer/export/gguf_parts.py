"""The tensors of a GGUF file: names, shapes, and values in llama.cpp's order."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFWriter, get_tensor_name_map
from safetensors import safe_open
from torch import Tensor

from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.json_text import read_json_object
from headrace.trainer.architecture.model_files import StoredTensor
from headrace.trainer.architecture.read_architecture import lay_out, read_architecture
from headrace.trainer.architecture.weight_index import adapter_file, stored_tensors
from headrace.trainer.export.gguf_family import rope_factors
from headrace.trainer.stored.gguf_records import GgufRecord, Piece

LORA_PREFIX = "base_model.model."
HEAD = "lm_head"
TIED = ("embed_tokens", HEAD)
LAYER = re.compile(r"layers\.(\d+)\.(.+)")  # its number, and a name within it
EXPERT = re.compile(r"experts\.(\d+)\.")  # its number in a name
MATRICES = {"A.weight": "a", "B.weight": "b", "embedding_A": "a", "embedding_B": "b"}


@dataclass(frozen=True)
class Part:
    """One tensor of the file: its GGUF name, shape, and how to get its float32 values."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[np.float32]]


class NameMap:
    """GGUF's name for a weight, and its values as llama.cpp wants them."""

    def __init__(self, record: GgufRecord, config: dict[str, Any]) -> None:
        self.record = record
        self.config = config
        self.map = get_tensor_name_map(record.arch, config["num_hidden_layers"])
        self.is_tied = bool(config.get("tie_word_embeddings"))

    def name(self, name: str, source: Path) -> str:
        """`model.layers.0.self_attn.q_proj.weight` -> `blk.0.attn_q.weight`.

        Raises:
            ConfigError: the architecture has no such weight.
        """
        found: str | None = self.map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(f"{source}: {name} has no name in GGUF; it cannot be exported")
        return found

    def pieces(self, name: str) -> list[Piece]:
        """Return what becomes of a weight that gguf itself has no name for."""
        found = LAYER.search(name)
        own = self.record.pieces.get(found[2], ()) if found else ()
        return [(f"blk.{found[1]}.{end}", change) for end, change in own] if found else []

    def arrange(self, name: str, values: Tensor) -> Tensor:
        """Rows of query and key weights in llama.cpp's order, norms with their offset."""
        if name.endswith("norm.weight"):
            return values + self.record.norm_offset
        if not self.record.rotates_pairs:
            return values
        if ".q_proj." in name:
            return pair_rows(values, self.config["num_attention_heads"])
        if ".k_proj." in name:
            return pair_rows(values, self.config["num_key_value_heads"])
        return values


def pair_rows(values: Tensor, heads: int) -> Tensor:
    """Interleave the halves of each head: row i of both become neighbors.

    Args:
        values: [heads * head size, ...].
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def model_parts(names: NameMap, model: Path) -> Iterator[Part]:
    """Yield the weights of a model directory, without a head that is the embedding again.

    The experts of a layer, stored one by one, become one tensor.
    """
    stored = stored_tensors(model)
    stacks: dict[str, list[str]] = {}
    for name in stored:
        if names.is_tied and name == f"{HEAD}.weight":
            continue
        stacks.setdefault(EXPERT.sub("experts.", name), []).append(name)
    for name, own in stacks.items():
        own.sort(key=lambda member: int((EXPERT.search(member) or [0, 0])[1]))
        first = stored[own[0]]
        pieces = names.pieces(name)
        yield from (cut_part(first, name, piece) for piece in pieces)
        if pieces:
            continue
        shape = tuple(first.shape) if own == [name] else (len(own), *first.shape)
        yield Part(names.name(name, first.path), shape, reader(names, stored, own, name))
    factors = rope_factors(names.config)
    if factors is not None:
        yield Part("rope_freqs.weight", factors.shape, lambda: factors)


def cut_part(stored: StoredTensor, name: str, piece: Piece) -> Part:
    """Return a part of a weight, or the weight turned, as llama.cpp wants it."""
    own, change = piece
    shape = tuple(change(torch.empty(stored.shape, device="meta")).shape)

    def read() -> npt.NDArray[np.float32]:
        return np.ascontiguousarray(change(read_one(stored.path, name)).numpy())

    return Part(own, shape, read)


def reader(
    names: NameMap, stored: Mapping[str, StoredTensor], own: list[str], name: str
) -> Callable[[], npt.NDArray[np.float32]]:
    """Return what reads one weight, or all experts of one, when its turn comes."""

    def read() -> npt.NDArray[np.float32]:
        values = [names.arrange(member, read_one(stored[member].path, member)) for member in own]
        whole = values[0] if own == [name] else torch.stack(values)
        return np.ascontiguousarray(whole.numpy())

    return read


def read_one(file: Path, name: str) -> Tensor:
    """Return a tensor of a file, in float32."""
    with safe_open(file, framework="pt") as tensors:
        values: Tensor = tensors.get_tensor(name)
    return values.float()


def base_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's weights by name, from its config.json alone."""
    weights = lay_out(read_architecture(model)).named_parameters(remove_duplicate=False)
    return {name: tuple(value.shape) for name, value in weights}


def adapter_parts(
    writer: GGUFWriter, names: NameMap, adapter: Path, base: Mapping[str, tuple[int, ...]]
) -> Iterator[Part]:
    """The matrices of a LoRA adapter in PEFT's format.

    Args:
        base: shapes of the model's weights.

    Raises:
        ConfigError: another kind of adapter, or nothing in it.
        DataError: matrices that are not of these weights.
    """
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise ConfigError(f"{adapter}: no adapter_config.json; give the `adapter` of a run")
    settings = read_json_object(path)
    for key in ("r", "lora_alpha"):
        if type(settings.get(key)) not in (int, float) or not 0 < settings[key] < 1 << 31:
            raise ConfigError(f"{path}: {key} = {settings.get(key)!r:.40} is no number above 0")
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if settings.get(key):
            raise ConfigError(f"{path}: {key} has no form in a GGUF adapter; merge it instead")
    rank, alpha = settings["r"], settings["lora_alpha"]
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    # llama.cpp scales by alpha / rank
    writer.add_float32(
        "adapter.lora.alpha", alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
    )
    file = adapter_file(adapter)
    with safe_open(file, framework="pt") as tensors:
        found = list(tensors.keys())
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in found}
        check_pairs(shapes, int(rank), file, base)
        for name in found:
            yield adapter_part(names, file, name, shapes[name])


def check_pairs(
    shapes: Mapping[str, tuple[int, ...]],
    rank: int,
    file: Path,
    base: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that each weight has both of its matrices, of the config's rank and of its own shape.

    Args:
        base: shapes of the model's weights.

    Raises:
        DataError: one is missing, or of another rank or shape.
    """
    for name, shape in shapes.items():
        weight, _, which = name.rpartition(".lora_")
        if which not in MATRICES:
            continue
        is_a = MATRICES[which] == "a"
        other = f"{weight}.lora_{which.replace('A', 'B') if is_a else which.replace('B', 'A')}"
        if other not in shapes:
            raise DataError(f"{file}: no tensor {other}, the other half of {name}")
        if len(shape) != 2 or shape[0 if is_a else 1] != rank:
            raise DataError(f"{file}: {name} has shape {list(shape)}, but r = {rank}")
        own = base.get(f"{weight.removeprefix(LORA_PREFIX)}.weight")
        if own is None:
            raise DataError(f"{file}: {name}: the model has no such weight; give its own model")
        wanted = pair_shape(own, rank, which)
        if shape != wanted:
            raise DataError(
                f"{file}: {name} has shape {list(shape)}, the model's weight {list(own)} calls for "
                f"{list(wanted)}; give the model that it was trained on"
            )


def pair_shape(weight: tuple[int, ...], rank: int, which: str) -> tuple[int, ...]:
    """Return the shape of one matrix of a pair: of A, [rank, inputs], or of B, [outputs, rank].

    The inputs of an embedding are its rows, one for each token; of a linear layer its columns.
    """
    outputs, inputs = reversed(weight) if which.startswith("embedding") else weight
    return (rank, inputs) if MATRICES[which] == "a" else (outputs, rank)


def adapter_part(names: NameMap, file: Path, name: str, shape: tuple[int, ...]) -> Part:
    """`...q_proj.lora_B.weight` -> `blk.0.attn_q.weight.lora_b`, rows arranged as in the base.

    Of an embedding, llama.cpp picks rows of A, one for each token, so A is transposed.
    """
    base, _, which = name.removeprefix(LORA_PREFIX).rpartition(".lora_")
    if which not in MATRICES:
        raise ConfigError(f"{file}: {name} has no form in a GGUF adapter; merge it instead")
    if names.is_tied and base.rpartition(".")[2] in TIED:
        raise ConfigError(
            f"{file}: {name}: embedding and head are one weight in GGUF; merge it instead"
        )
    base, letter, turned = base + ".weight", MATRICES[which], which == "embedding_A"

    def read() -> npt.NDArray[np.float32]:
        with safe_open(file, framework="pt") as tensors:
            values = tensors.get_tensor(name).float()
        if letter == "b":
            values = names.arrange(base, values)
        return np.ascontiguousarray((values.T if turned else values).numpy())

    return Part(f"{names.name(base, file)}.lora_{letter}", shape[::-1] if turned else shape, read)
