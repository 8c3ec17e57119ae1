"""The content of a `tokenizer.json`, which is the same in whatever bytes it is written."""

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


def is_tokenizer(record: TokenizerRecord, path: Path) -> bool:
    """Return whether a tokenizer.json is that of a manifest, in the same bytes or others."""
    if file_sha256(path) == record.fingerprint:
        return True
    wanted = record.content_fingerprint
    return wanted is not None and content_fingerprint(path.read_bytes(), path) == wanted
