"""Prompts that stages continue, and the answers to them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """Prompt to be answered, with `limit` tokens at most; `seed` is of this answer alone."""

    ids: list[int]
    limit: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """Its tokens, the one that ends it included if `ended`; else it came to its limit."""

    ids: list[int]
    ended: bool
