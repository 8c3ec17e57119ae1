"""The content of a `tokenizer.json`, which is the same in whatever bytes it is written."""

from collections.abc import Sequence
from pathlib import Path

from headrace.schemas.fingerprint import file_sha256, fingerprint
from headrace.schemas.json_text import parse_json
from headrace.schemas.shards.manifest import TokenizerRecord

NOT_USED = ("truncation", "padding")  # set when a tokenizer is called; shards are made without


def content_fingerprint(content: bytes, path: Path | str) -> str:
    """Return the SHA-256 of a tokenizer's parsed content, for each form that it is written in.

    Spaces, escapes and the order of keys do not count, nor whether a merge is "a b" or ["a", "b"],
    which the `tokenizers` library reads alike.

    Args:
        path: for messages.

    Raises:
        DataError: it is not JSON.
    """
    values = parse_json(content, path)
    if not isinstance(values, dict):
        return fingerprint(values)
    values = {key: value for key, value in values.items() if key not in NOT_USED}
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        values["model"] = model | {"merges": merges}
    return fingerprint(values)


def with_tokens(content: bytes, tokens: Sequence[str]) -> tuple[bytes, list[int]]:
    """Return a `tokenizer.json` with further tokens, as `added_tokens` of `headrace prepare` makes
    it, and their ids.
    """
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(content.decode())
    for text in tokens:
        tokenizer.add_tokens([AddedToken(text, normalized=False)])
    ids = [found for text in tokens if (found := tokenizer.token_to_id(text)) is not None]
    return tokenizer.to_str(pretty=True).encode(), ids


def known_tokens(content: bytes, tokens: Sequence[str]) -> list[str]:
    """Return those of some tokens that a `tokenizer.json` has."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content.decode())
    return [text for text in tokens if tokenizer.token_to_id(text) is not None]


def is_tokenizer(record: TokenizerRecord, path: Path, tokens: Sequence[str] = ()) -> bool:
    """Return whether a tokenizer.json is that of a manifest, in the same bytes or others.

    Args:
        tokens: that it lacks and the manifest's has.
    """
    if tokens:
        content, _ = with_tokens(path.read_bytes(), tokens)
        return record.content_fingerprint == content_fingerprint(content, path)
    if file_sha256(path) == record.fingerprint:
        return True
    wanted = record.content_fingerprint
    return wanted is not None and content_fingerprint(path.read_bytes(), path) == wanted
