"""Tokens added before and after a document, and the tokens that a config names."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from headrace.dataprep.text.encoding import encode_ids, encode_texts
from headrace.dataprep.text.tokens import Ids, TokenizerSpec
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.source_config import SourceConfig, Tokens


class Ends(NamedTuple):
    """Tokens added around a document, and the way its text is tokenized.

    Of BOS or EOS, which are single tokens, none is added where there is one already; a prefix or
    suffix of the config always is.
    """

    bos: int | None
    eos: int | None
    prefix: list[int]
    suffix: list[int]
    parse_special_tokens: bool


def document_ends(source: SourceConfig, spec: TokenizerSpec) -> Ends:
    """The ends of a source's documents."""
    parse = source.parse_special_tokens
    return Ends(
        bos=spec.bos if source.document_prefix is None else None,
        eos=spec.eos if source.document_suffix is None else None,
        prefix=token_ids(spec, source.document_prefix or ""),
        suffix=token_ids(spec, source.document_suffix or ""),
        parse_special_tokens=spec.parse_special_tokens if parse is None else parse,
    )


def token_ids(spec: TokenizerSpec, value: Tokens) -> list[int]:
    """The tokens that a config means: of a text, one id, or a list of ids.

    Raises:
        DataError: an id outside the vocabulary.
    """
    if value == "":
        return []
    if isinstance(value, str):
        return [int(token) for ids in encode_texts(spec, [value]) for token in ids]
    ids = [value] if isinstance(value, int) else value
    for token in ids:
        if not 0 <= token < spec.vocabulary_size:
            raise DataError(
                f"token id {token} of the config: {spec.folder} has ids 0 to "
                f"{spec.vocabulary_size - 1}; correct it"
            )
    return ids


def encode_documents(spec: TokenizerSpec, texts: Sequence[str], ends: Ends) -> list[Ids]:
    """Token ids of each text between its ends, shape [tokens].

    Empty where the tokenizer gives no token at all.
    """
    encoded = list(encode_ids(spec, texts, False, ends.parse_special_tokens))
    return surround_all(ends, encoded)


def surround_all(ends: Ends, encoded: Iterable[Ids]) -> list[Ids]:
    """Return each document's ids between its ends, in int32, as parts of one array.

    An empty document stays empty.
    """
    prefix, suffix = np.array(ends.prefix, np.int32), np.array(ends.suffix, np.int32)
    bos, eos = (np.array([end], np.int32) if end is not None else None for end in ends[:2])
    parts: list[Ids] = [np.empty(0, np.int32)]
    sizes = []
    for ids in encoded:
        before = len(parts)
        if len(ids):
            if len(prefix):
                parts.append(prefix)
            if bos is not None and ids.item(0) != ends.bos:
                parts.append(bos)
            parts.append(ids)
            if eos is not None and ids.item(-1) != ends.eos:
                parts.append(eos)
            if len(suffix):
                parts.append(suffix)
        sizes.append(sum(map(len, parts[before:])))
    flat = np.concatenate(parts, dtype=np.int32, casting="unsafe")
    return [flat[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]


def surround(ends: Ends, ids: Ids | list[int]) -> Ids:
    """Return `surround_all` of one document."""
    return surround_all(ends, [np.asarray(ids)])[0]
