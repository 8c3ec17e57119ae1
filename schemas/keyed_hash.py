"""A keyed hash of 64-bit numbers: the finalizer of SplitMix64, for any array library.

Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014
(https://doi.org/10.1145/2714064.2660195), in the variant "Mix13".
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15  # increment of the stream: 2^64 over the golden ratio
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
ArrayT = TypeVar("ArrayT", bound=Any)


def mix(
    numbers: ArrayT, shift: Callable[[ArrayT, int], ArrayT], factors: tuple[Any, Any]
) -> ArrayT:
    """Return a permutation of all 64-bit numbers, applied to each of `numbers`.

    Args:
        shift: to the right, with zeros from the left.
        factors: `FACTORS` in the type of the numbers.
    """
    numbers = (numbers ^ shift(numbers, 30)) * factors[0]
    numbers = (numbers ^ shift(numbers, 27)) * factors[1]
    return numbers ^ shift(numbers, 31)


def mix_numbers(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return `mix` of numpy's unsigned numbers."""
    with np.errstate(over="ignore"):
        return mix(numbers, shift_right, (np.uint64(FACTORS[0]), np.uint64(FACTORS[1])))


def spread(numbers: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Return `(number + 1) * GOLDEN` with the seed's bits flipped, for `mix` to scramble."""
    with np.errstate(over="ignore"):
        return (numbers + np.uint64(1)) * np.uint64(GOLDEN) ^ np.uint64(seed)


def shift_right(numbers: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Shift numpy's unsigned numbers to the right."""
    return numbers >> np.uint64(bits)
