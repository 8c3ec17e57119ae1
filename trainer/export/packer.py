"""compressed-tensors' schemes, applied to one weight at a time.

The library chooses scales, rounds and packs. Written against compressed-tensors 0.20.1.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from headrace.schemas.errors import ConfigError, install_hint


class Packer:
    """One of compressed-tensors' schemes, applied to one weight at a time.

    Args:
        name: of the library's preset.
        changes: of how it quantizes weights.

    Raises:
        ConfigError: the library is not installed.
    """

    def __init__(self, name: str, **changes: Any) -> None:
        try:
            from compressed_tensors.compressors import BaseCompressor
            from compressed_tensors.compressors.format import infer_module_format
            from compressed_tensors.quantization import preset_name_to_scheme
        except ImportError:
            hint = install_hint("quantize")
            raise ConfigError(f"quantize needs compressed-tensors; {hint}") from None
        self.scheme = preset_name_to_scheme(name, ["Linear"])
        self.scheme.weights = self.scheme.weights.model_copy(update=changes)
        self.format = infer_module_format(nn.Linear, self.scheme).value
        self.compressor = BaseCompressor.get_value_from_registry(self.format)

    def fits(self, columns: int) -> bool:
        """Return whether a row of so many inputs falls into whole groups."""
        return bool(columns % (self.scheme.weights.group_size or 1) == 0)

    @property
    def shares_scales(self) -> bool:
        """Return whether a weight has a scale of its own beside those of groups."""
        return bool(self.scheme.weights.strategy == "tensor_group")

    def pack(
        self, name: str, value: Tensor, extremes: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the tensors that stand for a weight.

        Args:
            extremes: smallest and largest value of all weights that share its scale.
        """
        state = scaled(value, self.scheme.weights, extremes)
        made = self.compressor.compress(state, self.scheme)
        stem = name.removesuffix("weight")
        return {stem + key: part.contiguous() for key, part in made.items()}

    def unpack(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weight that packed tensors stand for."""
        stem = name.removesuffix("weight")
        local = {key.removeprefix(stem): part for key, part in parts.items()}
        weight: Tensor = self.compressor.decompress(local, self.scheme)["weight"]
        return weight

    def settings(self, ignored: list[str]) -> dict[str, Any]:
        """Return what config.json says of the weights."""
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "config_groups": {"group_0": json.loads(self.scheme.model_dump_json())},
            "quantization_status": "compressed",
            "ignore": ignored,
        }


def scaled(
    value: Tensor, args: Any, extremes: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return a weight with the scales and zero points that the library finds for it.

    Args:
        args: of the library's scheme, for weights.
    """
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    value = value.bfloat16()
    state = {"weight": value}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(*(extremes or (value.min(), value.max())))
    groups = grouped(value, args)
    scale, zero = calculate_qparams(
        groups.amin(-1), groups.amax(-1), args, state.get("weight_global_scale")
    )
    state["weight_scale"] = scale if args.strategy == "tensor_group" else scale.to(value.dtype)
    return state | {"weight_zero_point": zero}


def grouped(value: Tensor, args: Any) -> Tensor:
    """Return the weights that share a scale in the last dimension, scales in those before it."""
    if args.strategy == "block":
        rows, columns = args.block_structure
        padding = (0, -value.shape[1] % columns, 0, -value.shape[0] % rows)
        blocks = nn.functional.pad(value, padding).unflatten(0, (-1, rows))
        return blocks.unflatten(2, (-1, columns)).transpose(1, 2).flatten(2)
    if args.group_size:
        return value.unflatten(-1, (-1, args.group_size))
    return value.unsqueeze(1) if args.strategy == "channel" else value.flatten()[None]
