"""Index of the tensors in a model directory's files: safetensors' headers, and what else is read.

Imports no torch.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian length, JSON, data).
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.json_text import parse_json, read_json_object
from headrace.schemas.named_files import check_inside, check_regular, named_file, open_regular
from headrace.schemas.outside_text import shown
from headrace.trainer.architecture.gguf_index import SUFFIX, gguf_files, gguf_tensors
from headrace.trainer.architecture.model_files import (
    INDEX_NAME,
    PICKLE_INDEX,
    PICKLE_NAME,
    SINGLE_NAME,
    PickledDirectory,
    StoredTensor,
)
from headrace.trainer.architecture.pickled_index import REMEDY, pickled_tensors

MAX_INDEX = 64 << 20  # bytes
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
SAMPLES = 64  # places a file is sampled at for its fingerprint
SAMPLE_BYTES = 4096
COMPARED_BYTES = 16 << 20  # at once

OTHER_WEIGHTS = (  # files of other forms -> what to do
    ("*.safetensors", f"is one of several files without their index; fetch {INDEX_NAME} as well"),
    (
        "*.bin",
        'is a pickle, which is read only with weights = "pickled", by an unpickler of tensors '
        f"alone; or {REMEDY}",
    ),
    ("*.pt*", f"is a pickle, which may run code and is not read; {REMEDY}"),
)
# ending of other files than safetensors -> what lists their tensors
INDEXES: Mapping[str, Callable[[Path], dict[str, StoredTensor]]] = {
    ".bin": pickled_tensors,
    SUFFIX: gguf_tensors,
}


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a model's weights.

    Raises:
        DataError: there are none, or one that the index names is missing.
    """
    found = named_files(directory, INDEX_NAME, SINGLE_NAME)
    if not found and isinstance(directory, PickledDirectory):
        found = named_files(directory, PICKLE_INDEX, PICKLE_NAME)
    found = found or gguf_files(directory)
    if not found:
        raise DataError(f"{directory}: no {SINGLE_NAME} and no {INDEX_NAME}; {way_out(directory)}")
    return found


def named_files(directory: Path, index_name: str, single_name: str) -> list[Path]:
    """Return the files that an index names, or the single one there is; none without either.

    Raises:
        DataError: one that the index names is missing.
    """
    index, single = directory / index_name, directory / single_name
    if not index.is_file():
        if not single.exists():
            return []
        check_regular(single)
        check_inside(single, directory)
        return [single]
    try:
        names = set(read_json_object(index, MAX_INDEX)["weight_map"].values())
        paths = [named_file(directory, name, index_name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: cannot be read ({error}); fetch the model again") from None
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: missing, but {index_name} lists it")
        check_regular(path)
    return sorted(paths)


def way_out(directory: Path) -> str:
    """Return what to do with a directory that has weights in another form, or none."""
    for pattern, remedy in OTHER_WEIGHTS:
        if found := sorted(directory.glob(pattern)):
            return f"{found[0].name} {remedy}"
    return "is this a model directory?"


def has_weights(directory: Path) -> bool:
    """Return whether a directory has weight files."""
    names = [INDEX_NAME, SINGLE_NAME]
    if isinstance(directory, PickledDirectory):
        names += [PICKLE_INDEX, PICKLE_NAME]
    return any((directory / name).is_file() for name in names) or bool(gguf_files(directory))


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a model directory, by name.

    Raises:
        DataError: as `weight_files` and `read_header`.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        tensors |= INDEXES.get(path.suffix, read_header)(path)
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        DataError: not a whole safetensors file.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = parse_json(file.read(length), path, "; fetch the model again")
        header.pop("__metadata__", None)
        start, size = 8 + length, path.stat().st_size
        tensors = {
            name: StoredTensor(
                path,
                entry["dtype"],
                tuple(entry["shape"]),
                start + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
        check_places(tensors, start)
        end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=start)
        if end > size:
            raise ValueError(f"{size} bytes, its header calls for {end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch the model again") from None
    return tensors


def check_places(tensors: Mapping[str, StoredTensor], start: int) -> None:
    """Check that tensors have sizes that can be, and lie one after the other.

    Raises:
        ValueError, TypeError: naming the first that does not.
    """
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if any(type(size) is not int or size < 0 for size in (*tensor.shape, tensor.nbytes)):
            raise ValueError(f"{shown(name)} has a size that cannot be")
        if tensor.offset != at:
            raise ValueError(f"{shown(name)} lies at {tensor.offset}, not at {at}")
        at += tensor.nbytes


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors hold the same, up to the first part that differs."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for done in range(0, one.nbytes, COMPARED_BYTES):
            size = min(COMPARED_BYTES, one.nbytes - done)
            if first.read(size) != second.read(size):
                return False
    return True


def weights_fingerprint(directory: Path) -> str:
    """Identity of a model's weights: all headers, and samples of each file's bytes.

    Reads at most 256 KiB a file, so a few changed values may pass; another fine-tune does not.

    Raises:
        DataError: as above.
    """
    return fingerprint([_file_identity(path) for path in weight_files(directory)])


def _file_identity(path: Path) -> list[object]:
    # the headers of other forms lie among the sampled bytes
    tensors = {} if path.suffix in INDEXES else read_header(path)
    header = {name: [t.dtype, t.shape, t.offset, t.nbytes] for name, t in tensors.items()}
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(number * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return [path.name, size, header, digest.hexdigest()]


def adapter_file(adapter: Path) -> Path:
    """Return the file of an adapter's tensors.

    Raises:
        ConfigError, DataError: it is missing, or no whole safetensors file.
    """
    file = adapter / "adapter_model.safetensors"
    if not file.exists():
        raise ConfigError(f"{adapter}: no {file.name}; give the `adapter` of a run")
    if not read_header(file):
        raise DataError(f"{file}: holds no tensor")
    return file
