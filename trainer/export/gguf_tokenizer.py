"""A Hugging Face tokenizer in GGUF's terms: kind, pre-tokenizer, tokens and their types."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from headrace.schemas.errors import ConfigError

# llama.cpp knows pre-tokenizers by name and spells out their patterns itself; here are those names
# by the patterns in tokenizer.json. GPT2 stands for the pattern that ByteLevel brings along.
GPT2 = "ByteLevel"
DIGIT = "Digits"
PRE_TOKENIZERS = {
    (GPT2,): "gpt-2",
    (DIGIT, GPT2): "smollm",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "llama-bpe",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "qwen2",
}


@dataclass(frozen=True)
class TokenTable:
    """Tokens by id, with GGUF's type and score of each."""

    texts: list[str]
    types: list[TokenType]
    scores: list[float]


def add_tokenizer(
    writer: GGUFWriter, model: Path, vocabulary_size: int, pre: str | None = None
) -> None:
    """Put the tokenizer of a model directory into a GGUF file.

    Args:
        vocabulary_size: rows of the embedding; ids beyond the tokenizer's are filled up.
        pre: llama.cpp's name of the pre-tokenizer, where its pattern is not one of the known ones.

    Raises:
        ConfigError: a kind of tokenizer, or a pre-tokenizer, that has no name in GGUF.
    """
    path = model / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    byte_fallback = bool(content["model"].get("byte_fallback"))
    if content["model"].get("type") != "BPE":
        raise ConfigError(f"{path}: {content['model'].get('type')} cannot be exported; only BPE")
    if byte_fallback:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(prepends_space(content))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or pre_tokenizer_name(content.get("pre_tokenizer"), path))
    table = token_table(content, vocabulary_size, byte_fallback)
    writer.add_token_list(table.texts)
    writer.add_token_types(table.types)
    if byte_fallback:
        writer.add_token_scores(table.scores)
    SpecialVocab(model, load_merges=not byte_fallback, n_vocab=vocabulary_size).add_to_gguf(
        writer, quiet=True
    )


def prepends_space(content: dict[str, Any]) -> bool:
    """Return whether a text begins with an added space, as SentencePiece does it."""
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or "always" in text


def pre_tokenizer_name(pre_tokenizer: Any, path: Path) -> str:
    """llama.cpp's name for what tokenizer.json describes.

    Raises:
        ConfigError: it is none of the known ones.
    """
    patterns = tuple(patterns_of(pre_tokenizer))
    if patterns in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[patterns]
    raise ConfigError(
        f"{path}: its pre-tokenizer {' + '.join(patterns) or 'none'} is not one of the known ones "
        f"({', '.join(PRE_TOKENIZERS.values())}); name llama.cpp's with --pre"
    )


def patterns_of(pre_tokenizer: Any) -> list[str]:
    """List the patterns that a pre-tokenizer splits at, step by step."""
    if pre_tokenizer is None:
        return []
    match pre_tokenizer["type"]:
        case "Sequence":
            return [p for part in pre_tokenizer["pretokenizers"] for p in patterns_of(part)]
        case "Split":
            return [str(pre_tokenizer["pattern"].get("Regex", pre_tokenizer["pattern"]))]
        case "ByteLevel":
            return [GPT2] if pre_tokenizer.get("use_regex", True) else []
        case "Digits" if pre_tokenizer.get("individual_digits"):
            return [DIGIT]
        case other:
            return [str(other)]


def token_table(content: dict[str, Any], vocabulary_size: int, byte_fallback: bool) -> TokenTable:
    """Every id's text, type and score; SentencePiece's order of merging is that of its ids."""
    by_id = {number: text for text, number in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    by_id |= {number: token["content"] for number, token in added.items()}
    texts, types = [], []
    for number in range(vocabulary_size):
        texts.append(by_id.get(number, f"[PAD{number}]"))
        types.append(token_type(by_id, added, number, byte_fallback))
    return TokenTable(texts, types, [-float(number) for number in range(vocabulary_size)])


def token_type(
    by_id: dict[int, str], added: dict[int, Any], number: int, byte_fallback: bool
) -> TokenType:
    """GGUF's type of one id."""
    if number not in by_id:
        return TokenType.UNUSED
    if number in added:
        special = added[number].get("special")
        return TokenType.CONTROL if special else TokenType.USER_DEFINED
    text = by_id[number]
    if byte_fallback and len(text) == 6 and text.startswith("<0x"):
        return TokenType.BYTE
    return TokenType.NORMAL
