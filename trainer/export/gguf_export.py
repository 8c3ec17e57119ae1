"""A model, or an adapter, as a GGUF file for llama.cpp.

Names and layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize

from headrace.schemas.progress import Progress, silent
from headrace.schemas.publish import writing
from headrace.trainer.architecture.config_limits import refuse_scored
from headrace.trainer.export.gguf_family import add_hyperparameters, read_model_config
from headrace.trainer.export.gguf_parts import (
    NameMap,
    Part,
    adapter_parts,
    base_shapes,
    model_parts,
)
from headrace.trainer.export.gguf_tokenizer import add_tokenizer
from headrace.trainer.export.output import check_new, new_output
from headrace.trainer.stored.gguf_records import gguf_record

StoredType = Literal["f32", "f16", "bf16", "q8_0"]
FILE_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def export_gguf(
    model: Path,
    output: Path,
    stored: StoredType = "bf16",
    adapter: Path | None = None,
    pre: str | None = None,
    progress: Progress = silent,
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
    check_new(output)
    refuse_scored(model)
    config = read_model_config(model)
    record = gguf_record(str(model), config)
    with new_output(output) as temporary:
        writer = GGUFWriter(temporary, MODEL_ARCH_NAMES[record.arch])
        names = NameMap(record, config)
        if adapter is not None:
            parts = list(adapter_parts(writer, names, adapter, base_shapes(model)))
        else:
            add_hyperparameters(writer, record.settings(config), record)
            writer.add_file_type(FILE_TYPES[stored][1])
            add_tokenizer(writer, model, config["vocab_size"], pre)
            parts = list(model_parts(names, model))
        with writing(output, "make room, and run the command again"):
            write_parts(writer, parts, stored, progress)
    return len(parts)


def write_parts(
    writer: GGUFWriter, parts: list[Part], stored: StoredType, progress: Progress
) -> None:
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
    sizes = [math.prod(part.shape) * 4 for part in parts]
    for part in progress(parts, sizes, "export"):
        writer.write_tensor_data(quantize(part.read(), part_type(part, stored)))
    writer.close()


def part_type(part: Part, stored: StoredType) -> GGMLQuantizationType:
    """Vectors stay in float32, and so do matrices whose rows do not divide into blocks."""
    kind = FILE_TYPES[stored][0]
    whole_blocks = kind is not GGMLQuantizationType.Q8_0 or part.shape[-1] % 32 == 0
    return kind if len(part.shape) > 1 and whole_blocks else GGMLQuantizationType.F32
