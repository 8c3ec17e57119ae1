"""Special tokens that stand in a text, kept as text.

`tokenizers` looks for special tokens before its model sees a text, and can be told not to. But a
model may have a special token among its own pieces, as SentencePiece's have `<s>`, and make it of
the letters. Here such pieces are given names that no text has. Where only some of the special
tokens of a text are to stay text, these carry a mark, which the normalizer takes out again.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from tokenizers import Tokenizer

NAMELESS = "\ufdd5"  # no character: it ends the name of a piece that no text must give
MARK = "\ufdd4"  # stands in a special token that is text
PROBES = ("{}", "a{}a", " {} ")


def special_texts(tokenizer: Tokenizer, ends: Collection[int]) -> dict[int, str]:
    """Return the special tokens of a tokenizer by id, and BOS and EOS where they are added ones.

    Args:
        ends: the ids of BOS and EOS.
    """
    added = tokenizer.get_added_tokens_decoder()
    return {n: t.content for n, t in added.items() if t.special or n in ends}


def makes_special(tokenizer: Tokenizer, special: Mapping[int, str]) -> bool:
    """Return whether a tokenizer that is to leave special tokens alone gives one of them."""
    probes = [probe.format(text) for text in special.values() for probe in PROBES if text]
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    found = tokenizer.encode_batch(probes, add_special_tokens=False)
    tokenizer.encode_special_tokens = before
    return any(special.keys() & {*encoding.ids} for encoding in found)


def without_special(content: str, special: Collection[str]) -> str:
    """Return a `tokenizer.json` whose model and added tokens match none of some texts; all ids
    stay."""
    values = json.loads(content)
    values["model"] = nameless(values["model"], special)
    for token in values.get("added_tokens") or ():
        if token["content"] in special:
            token["content"] += NAMELESS
    return json.dumps(values, ensure_ascii=False)


def nameless(model: dict[str, Any], special: Collection[str]) -> dict[str, Any]:
    """Return a model whose pieces of some texts have names that no text has."""

    def named(piece: str) -> str:
        return piece + NAMELESS if piece in special else piece

    changed = dict(model)
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        changed["vocab"] = {named(piece): number for piece, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        changed["vocab"] = [[named(piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        changed["unk_token"] = named(model["unk_token"])
    if model.get("merges"):
        changed["merges"] = [m for m in model["merges"] if merged(m) not in special]
    return changed


def merged(merge: str | list[str]) -> str:
    """Return the piece that a merge makes."""
    return "".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1)


def taking_marks_out(content: str, special: Collection[str]) -> str:
    """Return a `tokenizer.json` that finds special tokens, but none with a mark in it."""
    values = json.loads(content)
    for token in values.get("added_tokens") or ():
        if token["content"] in special:
            token["normalized"] = False  # it is looked for while the marks are there
    own = values.get("normalizer")
    steps = [{"type": "Replace", "pattern": {"String": MARK}, "content": ""}]
    values["normalizer"] = {"type": "Sequence", "normalizers": steps + ([own] if own else [])}
    return json.dumps(values, ensure_ascii=False)


def without_pieces(content: str, special: Collection[str]) -> str:
    """Return a `tokenizer.json` whose model makes no special token; added ones get other ids."""
    values = json.loads(content)
    return json.dumps(values | {"model": nameless(values["model"], special)}, ensure_ascii=False)


def special_pattern(texts: Collection[str]) -> re.Pattern[str]:
    """Return what finds special tokens in a text, the longest first."""
    ordered = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def mark_text(text: str, pattern: re.Pattern[str]) -> str:
    """Return a text in which no special token is found: a mark stands in each."""
    while (marked := pattern.sub(lambda found: f"{found[0][0]}{MARK}{found[0][1:]}", text)) != text:
        text = marked
    return text


def unmarked(text: str) -> str:
    """Return a text without its marks."""
    return text.replace(MARK, "")
