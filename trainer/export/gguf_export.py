"""A model, or an adapter, as a GGUF file for llama.cpp.

Names and layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
)
from gguf.quants import quant_shape_to_byte_shape, quantize
from rich.progress import track
from safetensors import safe_open
from torch import Tensor

from headrace.schemas.errors import ConfigError
from headrace.schemas.publish import rename_durably
from headrace.trainer.export.gguf_tokenizer import add_tokenizer

StoredType = Literal["f32", "f16", "bf16", "q8_0"]
FILE_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
LORA_PREFIX = "base_model.model."


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp wants a family's weights.

    `rotates_pairs`: it turns neighbouring channels, transformers turns the two halves of a head, so
    rows of query and key weights change places. `norm_offset` is added to the weights of norms.
    """

    arch: MODEL_ARCH
    rotates_pairs: bool = False
    norm_offset: float = 0.0


FAMILIES = {
    "llama": GgufFamily(MODEL_ARCH.LLAMA, rotates_pairs=True),
    "mistral": GgufFamily(MODEL_ARCH.LLAMA, rotates_pairs=True),
    "qwen2": GgufFamily(MODEL_ARCH.QWEN2),
    "qwen3": GgufFamily(MODEL_ARCH.QWEN3),
    "gemma2": GgufFamily(MODEL_ARCH.GEMMA2, norm_offset=1.0),
    "phi3": GgufFamily(MODEL_ARCH.PHI3),
}


@dataclass(frozen=True)
class Part:
    """One tensor of the file: its GGUF name, shape, and how to get its float32 values."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[np.float32]]


def export_gguf(
    model: Path,
    output: Path,
    stored: StoredType = "bf16",
    adapter: Path | None = None,
    pre: str | None = None,
) -> int:
    """Write a model or, with `adapter`, only the adapter, one tensor in memory at a time.

    Args:
        model: Hugging Face directory; for an adapter config.json of its base model is enough.
        stored: type of the matrices; vectors stay in float32.
        pre: llama.cpp's name of the pre-tokenizer, where it cannot be told from tokenizer.json.

    Returns:
        The number of tensors written.

    Raises:
        ConfigError: a family, adapter or tokenizer that has no form in GGUF, or the output exists.
    """
    if output.exists():
        raise ConfigError(f"{output}: exists already; remove it or choose another --output")
    config = read_model_config(model)
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise ConfigError(
            f'{model}: model_type "{config["model_type"]}" cannot be exported to GGUF; '
            f"supported: {', '.join(FAMILIES)}"
        )
    temporary = output.with_name(f".{output.name}.tmp")
    output.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(temporary, MODEL_ARCH_NAMES[family.arch])
    names = NameMap(family, config)
    if adapter is not None:
        parts = list(adapter_parts(writer, names, adapter))
    else:
        add_hyperparameters(writer, config, family)
        writer.add_file_type(FILE_TYPES[stored][1])
        add_tokenizer(writer, model, config["vocab_size"], pre)
        parts = list(model_parts(names, model))
    write_parts(writer, parts, stored)
    rename_durably(temporary, output)
    return len(parts)


def read_model_config(model: Path) -> dict[str, Any]:
    """config.json, its defaults filled in by transformers."""
    from transformers import AutoConfig

    if not (model / "config.json").is_file():
        raise ConfigError(f"{model}: no config.json; give a Hugging Face model directory")
    values: dict[str, Any] = AutoConfig.from_pretrained(model, local_files_only=True).to_dict()
    if not values.get("head_dim"):
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    return values


class NameMap:
    """GGUF's name for a weight, and its values as llama.cpp wants them."""

    def __init__(self, family: GgufFamily, config: dict[str, Any]) -> None:
        self.family = family
        self.config = config
        self.map = get_tensor_name_map(family.arch, config["num_hidden_layers"])

    def name(self, name: str, source: Path) -> str:
        """`model.layers.0.self_attn.q_proj.weight` -> `blk.0.attn_q.weight`.

        Raises:
            ConfigError: the architecture has no such weight.
        """
        found: str | None = self.map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(f"{source}: {name} has no name in GGUF; it cannot be exported")
        return found

    def arrange(self, name: str, values: Tensor) -> Tensor:
        """Rows of query and key weights in llama.cpp's order, norms with their offset."""
        if name.endswith("norm.weight"):
            return values + self.family.norm_offset
        if not self.family.rotates_pairs:
            return values
        if ".q_proj." in name:
            return pair_rows(values, self.config["num_attention_heads"])
        if ".k_proj." in name:
            return pair_rows(values, self.config["num_key_value_heads"])
        return values


def pair_rows(values: Tensor, heads: int) -> Tensor:
    """In each head, row i of the first half and row i of the second become neighbours.

    Args:
        values: [heads * head size, ...].
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def model_parts(names: NameMap, model: Path) -> Iterator[Part]:
    """All weights of a model directory; a head that is the embedding again is left out."""
    tied = bool(names.config.get("tie_word_embeddings"))
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{model}: no *.safetensors; merge the adapter first, or correct the path"
        )
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if tied and name == "lm_head.weight":
                    continue
                shape = tuple(tensors.get_slice(name).get_shape())
                yield Part(names.name(name, file), shape, reader(names, file, name))
    factors = rope_factors(names.config)
    if factors is not None:
        yield Part("rope_freqs.weight", factors.shape, lambda: factors)


def reader(names: NameMap, file: Path, name: str) -> Callable[[], npt.NDArray[np.float32]]:
    """Reads one weight when its turn comes."""

    def read() -> npt.NDArray[np.float32]:
        with safe_open(file, framework="pt") as tensors:
            values = names.arrange(name, tensors.get_tensor(name).float())
        return np.ascontiguousarray(values.numpy())

    return read


def adapter_parts(writer: GGUFWriter, names: NameMap, adapter: Path) -> Iterator[Part]:
    """The matrices of a LoRA adapter in PEFT's format.

    Raises:
        ConfigError: another kind of adapter, or nothing in it.
    """
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise ConfigError(f"{adapter}: no adapter_config.json; give the `adapter` of a run")
    settings = json.loads(path.read_text(encoding="utf-8"))
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
    file = adapter / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        found = list(tensors.keys())
        if not found:
            raise ConfigError(f"{file}: holds no tensor")
        for name in found:
            yield adapter_part(names, file, name, tuple(tensors.get_slice(name).get_shape()))


def adapter_part(names: NameMap, file: Path, name: str, shape: tuple[int, ...]) -> Part:
    """`...q_proj.lora_B.weight` -> `blk.0.attn_q.weight.lora_b`, rows arranged as in the base."""
    base, separator, which = name.removeprefix(LORA_PREFIX).rpartition(".lora_")
    if not separator or which not in ("A.weight", "B.weight"):
        raise ConfigError(f"{file}: {name} has no form in a GGUF adapter; merge it instead")
    base = base + ".weight"

    def read() -> npt.NDArray[np.float32]:
        with safe_open(file, framework="pt") as tensors:
            values = tensors.get_tensor(name).float()
        if which == "B.weight":
            values = names.arrange(base, values)
        return np.ascontiguousarray(values.numpy())

    return Part(f"{names.name(base, file)}.lora_{which[0].lower()}", shape, read)


def add_hyperparameters(writer: GGUFWriter, config: dict[str, Any], family: GgufFamily) -> None:
    """What llama.cpp must know of the architecture."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    if family.arch is MODEL_ARCH.GEMMA2:
        check_attention_scale(config)
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if family.arch in (MODEL_ARCH.GEMMA2, MODEL_ARCH.PHI3) and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    add_rope(writer, config["rope_parameters"])


def check_attention_scale(config: dict[str, Any]) -> None:
    """llama.cpp has no key for it: it takes the head size, or in the 27B shape the width of a head.

    Raises:
        ConfigError: the model has another scale.
    """
    is_27b = config["num_hidden_layers"] == 46
    width = config["hidden_size"] // config["num_attention_heads"]
    expected = width if is_27b else config["head_dim"]
    if config["query_pre_attn_scalar"] != expected:
        raise ConfigError(
            f"query_pre_attn_scalar = {config['query_pre_attn_scalar']} has no form in GGUF, "
            f"where it is always {expected}"
        )


def add_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    """Base and scaling of the rotary embedding.

    Raises:
        ConfigError: a scaling that GGUF has no form for.
    """
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope["rope_type"]:
        case "default" | "llama3":  # llama3: a factor for each frequency, see `rope_factors`
            return
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        case other:
            raise ConfigError(f'rope_type "{other}" cannot be exported to GGUF')


def rope_factors(config: dict[str, Any]) -> npt.NDArray[np.float32] | None:
    """What Llama 3 divides each frequency by, [head size / 2]; None for other models.

    Wavelengths above the old context over `low_freq_factor` are stretched by `factor`, those below
    it over `high_freq_factor` are left, between them it is interpolated.
    """
    rope = config["rope_parameters"]
    if rope["rope_type"] != "llama3":
        return None
    exponents = np.arange(0, config["head_dim"], 2, dtype=np.float64) / config["head_dim"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float32] = (1 / ((1 - kept) / rope["factor"] + kept)).astype(np.float32)
    return factors


def write_parts(writer: GGUFWriter, parts: list[Part], stored: StoredType) -> None:
    """Header first, then tensor after tensor."""
    for part in parts:
        kind = part_type(part, stored)
        dtype: type[np.generic] = np.float32
        shape = part.shape
        if kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            dtype, shape = np.uint8, quant_shape_to_byte_shape(part.shape, kind)
        elif kind is GGMLQuantizationType.F16:
            dtype = np.float16
        size = math.prod(shape) * np.dtype(dtype).itemsize
        writer.add_tensor_info(part.name, shape, np.dtype(dtype), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part in track(parts, "export", transient=True):
        writer.write_tensor_data(quantize(part.read(), part_type(part, stored)))
    writer.close()


def part_type(part: Part, stored: StoredType) -> GGMLQuantizationType:
    """Vectors stay in float32, and so do matrices whose rows do not divide into blocks."""
    kind = FILE_TYPES[stored][0]
    whole_blocks = kind is not GGMLQuantizationType.Q8_0 or part.shape[-1] % 32 == 0
    return kind if len(part.shape) > 1 and whole_blocks else GGMLQuantizationType.F32
