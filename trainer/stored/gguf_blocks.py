"""Weights of a GGUF file, under the names that transformers' model has for them.

A family's record says how llama.cpp lays out its weights; the package `gguf` has the names, and
dequantizes blocks. What transformers' own reader (5.23, `modeling_gguf_pytorch_utils.py`) does to
the values is the same: float32, rows of queries and keys put back, the offset of norms taken away.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.schemas.errors import ConfigError
from headrace.trainer.architecture.model_files import StoredTensor
from headrace.trainer.stored.codes import PIECE
from headrace.trainer.stored.stored_weight import Parts, StoredWeight


def gguf_weights(
    path: str, model: Any, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredWeight]:
    """Return the weights that a model's GGUF file holds, by name.

    Args:
        path: of the model, for messages.
        model: on the meta device, without adapters.

    Raises:
        ConfigError: a family whose layout is not known, or blocks that `gguf` cannot dequantize.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    config = model.config
    layout = layout_of(path, config)
    for kind in {stored.blocks for stored in tensors.values() if stored.blocks}:
        check_blocks(path, kind)
    names = get_tensor_name_map(MODEL_ARCH[layout.arch], config.num_hidden_layers)
    found = {}
    for name in model.state_dict():
        stored = tensors.get(names.get_name(name, try_suffixes=(".weight", ".bias")) or "")
        if stored is not None:
            (own,) = (key for key, value in tensors.items() if value is stored)
            dequantize = partial(read_values, stored.blocks, layout, name)
            found[name] = StoredWeight({"blocks": own}, dequantize)
    return found


@dataclass(frozen=True)
class GgufLayout:
    """Layout of a model's weights in llama.cpp.

    Attributes:
        arch: name in `gguf.MODEL_ARCH`.
        norm_offset: what llama.cpp adds to the weights of norms.
        query_heads, key_heads: whose channels are turned by neighbors; 0: by halves, as here.
    """

    arch: str
    norm_offset: float
    query_heads: int
    key_heads: int

    def arrange(self, name: str, values: Tensor) -> Tensor:
        """Return a weight, in float32, as transformers has it."""
        if name.endswith("norm.weight"):
            return values - self.norm_offset if self.norm_offset else values
        if self.query_heads and ".q_proj." in name:
            return halve_rows(values, self.query_heads)
        if self.key_heads and ".k_proj." in name:
            return halve_rows(values, self.key_heads)
        return values


def layout_of(path: str, config: Any) -> GgufLayout:
    """Return the layout of a model's weights in llama.cpp.

    Raises:
        ConfigError: it is not known.
    """
    from headrace.trainer.stored.gguf_records import GGUF_RECORDS, experts

    records = {
        name: record
        for name, record in GGUF_RECORDS.items()
        if experts not in record.writes and not record.pieces
    }
    record = records.get(config.model_type)
    if record is None:
        known = ", ".join(records)
        raise ConfigError(
            f'{path}: model_type "{config.model_type}" is not read from GGUF (read are {known}); '
            "load it with transformers (gguf_file=...) and write it with save_pretrained"
        )
    turned = record.rotates_pairs
    return GgufLayout(
        record.arch.name,
        record.norm_offset,
        config.num_attention_heads if turned else 0,
        config.num_key_value_heads if turned else 0,
    )


def check_blocks(path: str, kind: str) -> None:
    """Check that `gguf` dequantizes blocks of a kind.

    Raises:
        ConfigError: it does not.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    blocks = GGMLQuantizationType[kind]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[blocks][1]), np.uint8), blocks)
    except NotImplementedError:
        raise ConfigError(
            f"{path}: its GGUF file holds blocks of {kind}, which the package gguf does not "
            "dequantize; use a file of another type, or the model that it was made of"
        ) from None


def read_values(
    kind: str | None, layout: GgufLayout, name: str, parts: Parts, dtype: torch.dtype
) -> Tensor:
    """Return a weight from a tensor of GGUF, dequantized some rows at a time."""
    stored = parts["blocks"]
    if kind is None:
        return layout.arrange(name, stored.float()).to(dtype)
    from gguf import GGMLQuantizationType, dequantize

    rows = stored.cpu().flatten(0, -2).numpy()
    step = max(1, PIECE // rows.shape[1])
    blocks = GGMLQuantizationType[kind]
    pieces = [
        torch.from_numpy(dequantize(rows[start : start + step], blocks))
        for start in range(0, len(rows), step)
    ]
    values = torch.cat(pieces).view(*stored.shape[:-1], -1)
    return layout.arrange(name, values).to(stored.device, dtype)


def halve_rows(values: Tensor, heads: int) -> Tensor:
    """Return the rows of each head as two halves, of rows whose neighbors are of both.

    Args:
        values: [heads * head size, ...].
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)
