"""Index of the tensors in a model's GGUF files, under GGUF's own names. Imports no torch."""

import re
from functools import cache
from pathlib import Path

from headrace.schemas.errors import ConfigError, DataError
from headrace.trainer.architecture.model_files import StoredTensor

SPLIT = re.compile(r"^(.*)-\d{5}-of-(\d{5})\.gguf$")
PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64"}  # GGUF's type -> safetensors'
SUFFIX = ".gguf"


def gguf_files(directory: Path) -> list[Path]:
    """Return the GGUF files that hold a model's weights; none where there are none.

    Raises:
        DataError: several models, or a part of one that is missing.
    """
    found = sorted(directory.glob(f"*{SUFFIX}"))
    parts = [SPLIT.match(path.name) for path in found]
    whole = (
        len(found) <= 1
        if None in parts or not found
        else (
            len({(part[1], part[2]) for part in parts if part}) == 1
            and len(found) == int(parts[0][2] if parts[0] else 0)
        )
    )
    if not whole:
        names = ", ".join(path.name for path in found)
        raise DataError(
            f"{directory}: {names} are not the parts of one model; leave one model's files in it"
        )
    return found


def gguf_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one GGUF file, by GGUF's names; of quantized ones the bytes of rows.

    Raises:
        ConfigError: the package `gguf` is missing.
        DataError: the file is damaged.
    """
    stat = path.stat()
    return dict(_read(path, stat.st_size, stat.st_mtime_ns))


@cache
def _read(path: Path, size: int, changed: int) -> dict[str, StoredTensor]:
    try:
        from gguf import GGML_QUANT_SIZES, GGUFReader
    except ModuleNotFoundError:
        raise ConfigError(f"{path}: to read it: pip install 'gguf>=0.17'") from None
    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch the model again") from None
    found = {}
    for tensor in tensors:
        kind, shape = tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape))
        offset, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
        if offset + nbytes > size:
            raise DataError(f"{path}: ends before {tensor.name} does; fetch the model again")
        if kind in PLAIN:
            found[tensor.name] = StoredTensor(path, PLAIN[kind], shape, offset, nbytes)
            continue
        values, width = GGML_QUANT_SIZES[tensor.tensor_type]
        rows = (*shape[:-1], shape[-1] // values * width)
        found[tensor.name] = StoredTensor(path, "U8", rows, offset, nbytes, kind)
    return found
