"""Weights that bitsandbytes has quantized, in the files as transformers saves them."""

from collections.abc import Container

FOUR_BIT = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)


def companions(name: str, files: Container[str]) -> dict[str, str]:
    """Return the tensors of a stored weight: name in bitsandbytes' terms -> name in the files.

    Empty for weights that are not quantized.
    """
    found = {key: f"{name}.{key}" for key in FOUR_BIT if f"{name}.{key}" in files}
    scales = f"{name.removesuffix('weight')}SCB"
    return found | ({"SCB": scales} if scales in files else {})
