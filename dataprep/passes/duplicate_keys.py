"""Keys by which documents are duplicates: equal ones share one, similar ones at least one more."""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from headrace.schemas.errors import ConfigError, install_hint
from headrace.schemas.prepare.filter_config import DeduplicateConfig

EXACT, NEAR = 0, 1
WINDOW = 24  # characters, about four words of English; also works where words are not spaced
MINHASH_SEED = 7
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
KEY = np.dtype([("key", "<u8"), ("check", "<u8"), ("kind", "u1"), ("document", "<u4")])

Keys = npt.NDArray[np.void]


def check_library(config: DeduplicateConfig) -> None:
    """Refuse near duplicates, before any work, where the library is missing.

    Raises:
        ConfigError: it is not installed.
    """
    if config.near and find_spec("rensa") is None:
        raise ConfigError(f"deduplicate.near = true needs rensa; {install_hint('dedup')}")


def algorithm(config: DeduplicateConfig) -> int:
    """Return the version of the library's algorithm, which decides near keys beside the config."""
    if not config.near:
        return 0
    from rensa import RMinHash

    return int(RMinHash.ALGORITHM_VERSION)


def document_keys(
    config: DeduplicateConfig, numbers: Sequence[int], contents: Sequence[str | bytes]
) -> Keys:
    """The keys of some documents, each with the document's number."""
    texts = [normalize(content) for content in contents]
    found: list[tuple[bytes, int, int]] = []
    if config.exact:
        keys = (hashlib.blake2b(text, digest_size=16).digest() for text in texts)
        found += [(key, EXACT, number) for key, number in zip(keys, numbers, strict=True)]
    if config.near and texts:
        for number, bands in zip(numbers, near_keys(config, texts), strict=True):
            found += [(key, NEAR, number) for key in bands]
    return np.array(
        [(*np.frombuffer(key, "<u8"), kind, number) for key, kind, number in found], KEY
    )


def normalize(content: str | bytes) -> bytes:
    """Text without the differences of case, white space and Unicode form; bytes as they are."""
    if isinstance(content, bytes):
        return content
    return " ".join(unicodedata.normalize("NFKC", content).casefold().split()).encode()


def near_keys(config: DeduplicateConfig, texts: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Yield for each text one key for each band of its MinHash.

    Two texts of Jaccard similarity s share a key with probability 1 - (1 - s^rows)^bands
    (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4).
    """
    from rensa import RMinHash

    bands, rows = band_shape(config.similarity, config.permutations)
    windows = [hash_windows(text) for text in texts]
    offsets = np.append(0, np.cumsum([len(hashes) for hashes in windows])).tolist()
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(windows), offsets, config.permutations, MINHASH_SEED
    )
    for digest in np.array(matrix.to_rows(), np.dtype("<u4")):
        yield [
            hashlib.blake2b(
                digest[band * rows : (band + 1) * rows].tobytes(), digest_size=16, key=b"%d" % band
            ).digest()
            for band in range(bands)
        ]


def band_shape(similarity: float, permutations: int) -> tuple[int, int]:
    """Bands and rows in each, so that half of the pairs of this similarity share a key."""

    def miss(rows: int) -> float:
        return abs((1 - similarity**rows) ** (permutations // rows) - 0.5)

    rows = min(range(1, permutations + 1), key=miss)
    return permutations // rows, rows


def hash_windows(text: bytes) -> npt.NDArray[np.uint64]:
    """A hash of each run of WINDOW characters; one of the whole text where it is shorter."""
    characters = np.frombuffer(as_utf32(text), "<u4").astype(np.uint64)
    width = min(WINDOW, len(characters))
    hashes = np.zeros(len(characters) - width + 1, np.uint64)
    for offset in range(width):
        hashes *= MULTIPLIER
        hashes += characters[offset : offset + len(hashes)]
    hashes ^= hashes >> np.uint64(32)
    return hashes


def as_utf32(text: bytes) -> bytes:
    """Four bytes for each character; of pretokenized content, for each byte."""
    try:
        return text.decode().encode("utf-32-le")
    except UnicodeDecodeError:
        return text.decode("latin-1").encode("utf-32-le")
