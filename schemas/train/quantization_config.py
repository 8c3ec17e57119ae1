"""The `[quantization]` table: the format in which frozen weights are held."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from headrace.schemas.config_model import Config, IsNumber, Text
from headrace.schemas.errors import ConfigError

FOLDER = "headrace.trainer.quantized"
FOUR_BIT_ONLY = ("double_quantization", "storage_type")


@dataclass(frozen=True)
class BackendRecord:
    """One value of `backend`. To add one, add its record here, and its class in a file of FOLDER.

    Attributes:
        description: for the config reference.
        formats: its classes, as `module:name`, by `type`; under "" where it has one alone.
        keys: of `[quantization]` that mean something with it alone.
        package: the library that it needs, and `pip_line`, what installs it.
        in_fp8: products are of 8-bit floats.
    """

    description: str
    formats: Mapping[str, str]
    keys: tuple[str, ...] = ()
    package: str | None = None
    pip_line: str | None = None
    in_fp8: bool = False


BACKENDS: Mapping[str, BackendRecord] = {
    "bnb": BackendRecord(
        "bitsandbytes.",
        {"nf4": f"{FOLDER}.nf4:Nf4", "fp4": f"{FOLDER}.nf4:Fp4", "int8": f"{FOLDER}.int8:Int8"},
        ("type", "double_quantization", "storage_type", "int8_threshold"),
        "bitsandbytes",
        'pip install "bitsandbytes>=0.49"',
    ),
    "hqq": BackendRecord(
        "half-quadratic quantization.",
        {"": f"{FOLDER}.hqq:Hqq"},
        ("bits", "group_size", "axis", "dynamic_config"),
        "hqq",
        'pip install "hqq>=0.2.8"',
    ),
    "fp8": BackendRecord(
        "8-bit floats with a scale for each output channel, multiplied as such in both directions.",
        {"": f"{FOLDER}.fp8:Fp8"},
        in_fp8=True,
    ),
}
if TYPE_CHECKING:
    Backend = str
else:
    Backend = Literal[tuple(BACKENDS)]

Bits = Annotated[Literal[8, 4, 3, 2, 1], IsNumber]
Axis = Annotated[Literal[0, 1], IsNumber]


class HqqOverride(Config):
    """Settings of some weights that differ from those of the others."""

    bits: Bits | None = Field(None, description="As `quantization.bits`.")
    group_size: int | None = Field(None, ge=8, description="As `quantization.group_size`.")
    axis: Axis | None = Field(None, description="As `quantization.axis`.")


class QuantizationConfig(Config):
    """`[quantization]`."""

    backend: Backend = Field(
        description=" ".join(
            f'`"{name}"`: {record.description}' for name, record in BACKENDS.items()
        )
    )
    type: Literal["nf4", "fp4", "int8"] = Field(
        "nf4", description='bnb: 4-bit normal floats or floats in blocks of 64, or `"int8"` by row.'
    )
    double_quantization: bool = Field(
        False, description="bnb, 4 bits: quantize the scales too, for 0.37 bits less a weight."
    )
    storage_type: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        "uint8", description="bnb, 4 bits: the type as which packed weights lie in memory."
    )
    int8_threshold: float | None = Field(
        None,
        ge=0,
        description="bnb, `int8`: quantize activations too (LLM.int8()), except for columns with a "
        "magnitude above this; 0 is none, bitsandbytes' default 6. Default: weights alone.",
    )
    bits: Bits = Field(4, description="hqq: bits of a weight.")
    group_size: int = Field(
        64, ge=8, description="hqq: weights that share a scale; must divide those of each matrix."
    )
    axis: Axis = Field(0, description="hqq: 0 groups weights that lie apart, 1 neighbors in a row.")
    dynamic_config: dict[str, HqqOverride] = Field(
        {},
        description="hqq: other bits, group sizes and axes for weights with a text in their name; "
        "of several, the first counts. `[quantization.dynamic_config.down_proj]`, then `bits = 8`.",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type that weights are multiplied in. `auto`: the run's `dtype`."
    )
    matmul: Literal["auto", "fp8"] = Field(
        "auto",
        description='`"fp8"`: turn weights to 8-bit floats instead of `compute_dtype` for each '
        'product, and multiply in them, both ways. `"auto"`: only with `backend = "fp8"`, which '
        "needs no turning.",
    )
    skip_modules: list[Text] = Field(
        ["lm_head"], description="Modules with one of these in their name are left as they are."
    )
    experts: bool = Field(True, description="Quantize the fused weights of experts.")
    embedding: bool = Field(
        False, description="Quantize the embedding, and with it a head that is tied to it."
    )
    cache: Text | None = Field(
        None,
        description="Folder for quantized layers, which later runs read instead of quantizing "
        "again. Default: none is kept.",
    )

    @field_validator("dynamic_config")
    @classmethod
    def check_overrides(cls, value: dict[str, HqqOverride]) -> dict[str, HqqOverride]:
        for name, override in value.items():
            if not override.model_fields_set:
                raise ValueError(f"dynamic_config.{name} sets nothing; give it bits, for example")
        return value

    @model_validator(mode="after")
    def check(self) -> "QuantizationConfig":
        others = (record.keys for name, record in BACKENDS.items() if name != self.backend)
        for key in chain(*others):
            if key in self.model_fields_set:
                raise ValueError(f'{key} has no meaning with backend = "{self.backend}"; drop it')
        if self.type == "int8":
            for key in FOUR_BIT_ONLY:
                if key in self.model_fields_set:
                    raise ValueError(f'{key} has no meaning with type = "int8"; drop it')
        elif self.int8_threshold is not None:
            raise ValueError(f'int8_threshold has no meaning with type = "{self.type}"; drop it')
        if self.in_fp8 and self.int8_threshold is not None:
            raise ValueError('int8_threshold multiplies in integers, matmul = "fp8" does not')
        return self

    @property
    def record(self) -> BackendRecord:
        """Return what else is to be known of the backend."""
        return BACKENDS[self.backend]

    @property
    def in_fp8(self) -> bool:
        """Say whether products are of 8-bit floats."""
        return self.matmul == "fp8" or self.record.in_fp8

    def hqq_settings(self, name: str) -> tuple[int, int, int]:
        """Bits, group size and axis of the weight of this name."""
        found = next((o for part, o in self.dynamic_config.items() if part in name), HqqOverride())
        return (
            found.bits if found.bits is not None else self.bits,
            found.group_size if found.group_size is not None else self.group_size,
            found.axis if found.axis is not None else self.axis,
        )


def check_installed(backend: str) -> None:
    """The library of a backend must be there.

    Raises:
        ConfigError: with the line that installs it.
    """
    record = BACKENDS[backend]
    if record.package is not None and find_spec(record.package) is None:
        raise ConfigError(
            f'quantization.backend = "{backend}" needs {record.package}: {record.pip_line}'
        )
