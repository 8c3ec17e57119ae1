"""Texts to token ids, by the backend that the config names."""

from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Encoding, Tokenizer

from headrace.dataprep.text.fast_tokenizer import encode_fast
from headrace.dataprep.text.long_texts import encode_long
from headrace.dataprep.text.special_pieces import MARK
from headrace.dataprep.text.token_places import token_places
from headrace.dataprep.text.tokenizer import open_marked, open_tokenizer
from headrace.dataprep.text.tokens import Ids, Located, TokenizerSpec

BATCH_BYTES = 1 << 19  # an encoding takes about 500 bytes a token until its ids are taken out
FAST_BATCH_BYTES = 1 << 20  # of the faster one, which is compared in each
LONG_TEXT = 1 << 20  # characters; longer ones are tokenized in pieces


def encode_texts(
    spec: TokenizerSpec,
    texts: Sequence[str],
    *,
    add_special_tokens: bool = False,
    parse_special_tokens: bool = True,
) -> list[Ids]:
    """Token ids of each text, shape [tokens], whatever `bos` and `eos` say.

    Args:
        add_special_tokens: add what the tokenizer itself adds (its post-processor's BOS, EOS).
        parse_special_tokens: whether `<|...|>` in a text becomes the special token.
    """
    return list(encode_ids(spec, texts, add_special_tokens, parse_special_tokens))


def encode_ids(
    spec: TokenizerSpec, texts: Sequence[str], add_special_tokens: bool, parse_special_tokens: bool
) -> Iterator[Ids]:
    """Token ids of each text, by the backend that the config names."""
    if spec.backend != "tokenizers":
        for batch in batches(texts, FAST_BATCH_BYTES):
            yield from encode_fast(spec, batch, add_special_tokens, parse_special_tokens)
        return
    tokenizer = open_tokenizer(spec, parse_special_tokens)
    for batch in batches(texts):
        if len(batch) == 1 and len(batch[0]) > LONG_TEXT:
            yield encode_one(tokenizer, batch[0], add_special_tokens).ids
            continue
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=add_special_tokens):
            yield np.array(encoding.ids, dtype=np.int32)


def encode_one(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Located:
    """Return the tokens of one long text."""
    tokens = encode_long(tokenizer, text)
    located = Located(tokens.ids, tokens.starts, tokens.ends)
    if not add_special_tokens:
        return located
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True)
    before = whole.special_tokens_mask.index(0)
    place = locate(whole)
    cuts = (slice(None, before), slice(before + len(plain), None))
    return Located(
        *(
            np.concatenate([ends[cuts[0]], column, ends[cuts[1]]]).astype(np.int32)
            for ends, column in zip(place, located, strict=True)
        )
    )


def encode_located(
    spec: TokenizerSpec,
    texts: Sequence[str],
    *,
    add_special_tokens: bool = False,
    parse_special_tokens: bool = True,
) -> list[Located]:
    """The same with each token's place in its text, in characters.

    Of byte-level tokenizers the places come from the ids, which the config's backend may give.
    """
    places = None if add_special_tokens else token_places(spec, parse_special_tokens)
    if places is None:
        return locate_all(open_tokenizer(spec, parse_special_tokens), texts, add_special_tokens)
    ids = encode_ids(spec, texts, False, parse_special_tokens)
    found = [places.locate(text, own) for text, own in zip(texts, ids, strict=True)]
    others = [text for text, located in zip(texts, found, strict=True) if located is None]
    rest = iter(locate_all(open_tokenizer(spec, parse_special_tokens), others, False))
    return [next(rest) if located is None else located for located in found]


def encode_chats(spec: TokenizerSpec, texts: Sequence[str], marked: bool) -> list[Located]:
    """The same for rendered conversations.

    Args:
        marked: whether special tokens with a mark in them are text.
    """
    if not marked:
        return encode_located(spec, texts)
    special = [text for text in texts if MARK in text]
    plain = iter(encode_located(spec, [text for text in texts if MARK not in text]))
    if not special:
        return list(plain)
    found = open_marked(spec)
    located = (
        Located(found.ids[tokens.ids], tokens.starts, tokens.ends)
        for tokens in locate_all(found.tokenizer, special, False)
    )
    return [next(located if MARK in text else plain) for text in texts]


def locate_all(
    tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool
) -> list[Located]:
    """Ids and places of the tokens of each text."""
    found: list[Located] = []
    for batch in batches(texts):
        if len(batch) == 1 and len(batch[0]) > LONG_TEXT:
            found.append(encode_one(tokenizer, batch[0], add_special_tokens))
            continue
        encodings = tokenizer.encode_batch(batch, add_special_tokens=add_special_tokens)
        found += map(locate, encodings)
    return found


def locate(encoding: Encoding) -> Located:
    """Ids and places of one text's tokens."""
    places = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
    return Located(np.array(encoding.ids, dtype=np.int32), places[:, 0], places[:, 1])


def batches(texts: Sequence[str], limit: int = BATCH_BYTES) -> Iterator[Sequence[str]]:
    """Consecutive texts of about `limit` characters, each long one by itself."""
    start, size = 0, 0
    for end, text in enumerate(texts, start=1):
        if len(text) > LONG_TEXT and start < end - 1:
            yield texts[start : end - 1]
            start, size = end - 1, 0
        size += len(text)
        if size >= limit:
            yield texts[start:end]
            start, size = end, 0
    if start < len(texts):
        yield texts[start:]
