"""The model families that the pipeline runs, each a small record over transformers' own modules."""

from dataclasses import dataclass

from headrace.schemas.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """Where a decoder-only model keeps its parts: paths inside transformers' causal model."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"


# model_type in config.json -> record
FAMILIES = {"llama": Family()}


def require_family(model_type: str, path: str) -> Family:
    """The record of a model type.

    Raises:
        ConfigError: a family that is not supported, with the ones that are.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise ConfigError(
            f'{path}: model_type "{model_type}" is not supported; supported: '
            + ", ".join(sorted(FAMILIES))
        )
    return family
