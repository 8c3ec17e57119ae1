"""An optional faster tokenizer, trusted only as far as `tokenizers` gives the same ids."""

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.dataprep.text.tokenizer import control_ids, open_marked, open_tokenizer, text_content
from headrace.dataprep.text.tokens import Ids, TokenizerSpec
from headrace.schemas.errors import ConfigError, DataError, install_hint

logger = logging.getLogger(__name__)

SLOW, FAST = "tokenizers", "fastokens"
CHECKED_CHARACTERS = 512  # of two texts of each batch: 0.2% of the text, 2 ns a token
SHOWN_CHARACTERS = 60
REMEDY = 'set tokenizer_backend = "tokenizers"'

# What tokenizers differ in: digits, white space, case, marks, scripts, emoji, control characters,
# special tokens, and a word that is longer than any merge.
HARD_TEXTS = (
    " leading, trailing ",
    "a  b   c\t\td\r\n\n\n  e \u00a0\u2009\u3000f",
    "1234567890 3.14159 1,000,000 0x1F 12ab34 ½ ²³ ٣٤ 一二",
    "don't we'll I'VE it's L'été O\u2019Neill",
    "na\u00efve nai\u0308ve \ufb01n \u212bngstr\u00f6m \u1e9b\u0323 STRASSE stra\u00dfe İ",
    "Ελληνικά русский עברית العربية हिन्दी ไทย 日本語 한국어 中文 ᚠᚢᚦ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301\u0323 \u200b\u200d\ufeff \U0010ffff",
    "\x00\x01\x1b[0m\x7f\x85 \ufffd",
    "<s></s><|endoftext|><|im_start|>user\n[INST] <unk> <pad> ▁ Ġ",
    "def f(x): return {'a': [x ** 2, -1]}  # -> ==!=<=>=",
    "http://a.b/c?d=e&f=%20 someone@example.org",
    "Donaudampfschiffahrtselektrizitätenhauptbetriebswerkbauunterbeamten" * 4,
    "a" * 300 + "-" * 300 + " " * 300 + "\n" * 300,
)


def choose_backend(spec: TokenizerSpec, wanted: str) -> str:
    """Return the library that tokenizes: the faster one, of "auto", where it may be trusted.

    Raises:
        ConfigError, DataError: the faster one is asked for by name, and cannot be used.
    """
    if wanted != "auto":
        if wanted != SLOW:
            check_backend(replace(spec, backend=wanted))
        return wanted
    if find_spec(FAST) is None:
        return SLOW
    try:
        check_backend(replace(spec, backend=FAST))
    except BaseException as error:
        if not isinstance(error, DataError) and type(error).__name__ != "PanicException":
            raise
        logger.info("%s is not used: %s", FAST, str(error).removesuffix(f"; {REMEDY}"))
        return SLOW
    return FAST


def check_backend(spec: TokenizerSpec) -> None:
    """Refuse the faster tokenizer, before any work, where it is missing or gives other ids.

    Raises:
        ConfigError: it is not installed.
        DataError: it cannot use this `tokenizer.json`, or gives other ids for it.
    """
    if find_spec(spec.backend) is None:
        raise ConfigError(
            f'tokenizer_backend = "{spec.backend}" needs {spec.backend}; {install_hint("fast")}'
        )
    for parse_special_tokens in (False, True):
        for add_special_tokens in (False, True):
            compare(spec, HARD_TEXTS, add_special_tokens, parse_special_tokens)


def encode_fast(
    spec: TokenizerSpec, texts: Sequence[str], add_special_tokens: bool, parse_special_tokens: bool
) -> Iterator[Ids]:
    """Ids of one batch of texts, each of shape [tokens]; a sample of them is compared.

    Raises:
        DataError: `tokenizers` gives other ids.
    """
    sample = [text[:CHECKED_CHARACTERS] for text in (texts[0], texts[len(texts) // 2])]
    compare(spec, sample, add_special_tokens, parse_special_tokens)
    return encode(
        open_fast(spec, parse_special_tokens), texts, add_special_tokens, parse_special_tokens
    )


def open_fast(spec: TokenizerSpec, parse_special_tokens: bool) -> Any:
    """The faster tokenizer, kept per process: one for both, where its model allows it."""
    return load_fast(spec, parse_special_tokens or not spec.makes_special)


@functools.lru_cache(maxsize=2)
def load_fast(spec: TokenizerSpec, parse_special_tokens: bool) -> Any:
    """The faster tokenizer itself. Its library has no types."""
    import fastokens

    content = text_content(spec, parse_special_tokens)
    try:
        tokenizer = fastokens.Tokenizer.from_json_str(content)
    except Exception as error:  # noqa: BLE001  the bindings raise what the parser gives
        raise DataError(f"{spec.file}: {spec.backend} cannot use it ({error}); {REMEDY}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def close_tokenizers() -> None:
    """Let go of the tokenizers that this process keeps: the shuffle needs the memory instead."""
    for kept in (open_tokenizer, open_marked, control_ids, load_fast):
        kept.cache_clear()
    pa.system_memory_pool().release_unused()  # what malloc holds; Arrow's arrays lie elsewhere


def encode(
    tokenizer: Any, texts: Sequence[str], add_special_tokens: bool, parse_special_tokens: bool
) -> Iterator[Ids]:
    """Ids of each text: views of one array."""
    content, offsets = tokenizer.encode_batch_flat(
        list(texts),
        add_special_tokens=add_special_tokens,
        split_special_tokens=not parse_special_tokens,
    )
    ids = np.frombuffer(content, np.int32)
    for start, end in pairwise(np.frombuffer(offsets, np.uint64).tolist()):
        yield ids[start:end]


def compare(
    spec: TokenizerSpec, texts: Sequence[str], add_special_tokens: bool, parse_special_tokens: bool
) -> None:
    """Refuse any difference from `tokenizers`, with the text."""
    expected = open_tokenizer(spec, parse_special_tokens).encode_batch_fast(
        texts, add_special_tokens=add_special_tokens
    )
    found = encode(
        open_fast(spec, parse_special_tokens), texts, add_special_tokens, parse_special_tokens
    )
    for text, right, ids in zip(texts, expected, found, strict=True):
        if ids.tolist() != right.ids:
            place = first_difference(ids.tolist(), right.ids)
            raise DataError(
                f"{spec.file}: {spec.backend} gives other ids than tokenizers from token {place} "
                f"of {text[:SHOWN_CHARACTERS]!r} on; {REMEDY}"
            )


def first_difference(left: list[int], right: list[int]) -> int:
    """The first place at which two lists differ, or the length of the shorter."""
    pairs = zip(left, right, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
