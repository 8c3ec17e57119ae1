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
    names = [path.name for path in found]
    if found and not is_one_model(names):
        raise DataError(
            f"{directory}: {', '.join(names)} are not the parts of one model; leave all files of "
            "one model in it, and no others"
        )
    return found


def is_one_model(names: list[str]) -> bool:
    """Return whether files are one, or all the parts that their names tell of."""
    parts = [SPLIT.match(name) for name in names]
    if not any(parts):
        return len(names) == 1
    models = {(part[1], int(part[2])) for part in parts if part}
    return all(parts) and len(models) == 1 and models.pop()[1] == len(names)


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
