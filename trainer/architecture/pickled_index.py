"""Index of the tensors in a model's pickles, `pytorch_model.bin`: where their bytes lie.

The pickle is unpickled by torch's own restricted unpickler (`weights_only=True`), which makes
tensors, numbers and texts alone, without the tensors' bytes. These are read like any other file's.
"""

import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

from headrace.schemas.errors import DataError
from headrace.trainer.architecture.model_files import StoredTensor

DAMAGE = (  # what unpickling bytes of any kind raises
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
    struct.error,
)
REMEDY = (
    "load the model with transformers in an environment that you trust and write it with "
    "save_pretrained, which makes safetensors files"
)


def pickled_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one pickle, by name.

    Raises:
        DataError: it holds something else, or is not of a form whose tensors can be found.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with warnings.catch_warnings(), FakeTensorMode():
            warnings.simplefilter("ignore")  # of protocols that it then reads or refuses
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *DAMAGE) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read as tensors alone ({reason}); {REMEDY}") from None
    if not isinstance(loaded, dict):
        raise DataError(f"{path}: holds a {type(loaded).__name__}, not tensors by name; {REMEDY}")
    size = path.stat().st_size
    return {
        name: place_of(path, size, name, value)
        for name, value in loaded.items()
        if isinstance(value, torch.Tensor)
    }


def place_of(path: Path, size: int, name: str, value: Any) -> StoredTensor:
    """Return where a tensor's bytes lie, given the tensor without them.

    Raises:
        DataError: they do not lie in one piece of the file.
    """
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    kind = NAMES.get(str(value.dtype).removeprefix("torch."))
    if start is None or kind is None or not value.is_contiguous():
        raise DataError(
            f"{path}: {name} ({value.dtype}) does not lie in one piece, as torch 1.6 and later "
            f"write it; {REMEDY}"
        )
    offset = start + value.storage_offset() * value.itemsize
    nbytes = value.numel() * value.itemsize
    if offset + nbytes > size:
        raise DataError(f"{path}: ends before {name} does; fetch the model again")
    return StoredTensor(path, kind, tuple(value.shape), offset, nbytes)


NAMES = {  # torch's name of a type -> safetensors'
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
