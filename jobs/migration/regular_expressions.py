r"""The names that a regular expression of an old config stands for, where they are a short list.

PEFT takes `model.layers.[\d]+.(mlp|self_attn).(up|q)_proj` for whole names; ours are lists of ends
of names, so the part after the layer's number is enough.
"""

import re
from itertools import product

NUMBER = r"\(?(?:\?:)?\[?(?:\\d|0-9|\d-\d)\]?[+*]?\)?"
FRONT = re.compile(
    rf"^(?:.*(?:layers|blocks|h)\\?\.(?:{NUMBER}|\.[+*])\\?\.|\^?\.[*+]\??(?:\\?\.)?)"
)
TOKEN = re.compile(r"\(\?:|\(|\)|\||\\?\.|[\w-]+|\$")
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP_ENDS = ("up_proj", "down_proj", "gate_proj", "gate_up_proj", "fc1", "fc2", "w1", "w2", "w3")
ABSENT = "cross_attn"  # which examples name in vain: no language model here has one


def module_names(pattern: str) -> list[str] | None:
    """Return the ends of module names that a pattern stands for; None if they cannot be listed."""
    front = FRONT.match(pattern)
    if front is None:
        name = literal(pattern)
        return None if name is None else [name]
    names = alternatives(pattern[front.end() :])
    if names is None:
        return None
    found = [name for name in dict.fromkeys(names) if exists(name)]
    return found or None


def literal(pattern: str) -> str | None:
    """Return the text that a pattern stands for as it is; None if it leaves something open."""
    text = pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".")
    return text if re.fullmatch(r"[\w.-]+", text) else None


def alternatives(pattern: str) -> list[str] | None:
    """Return all texts that a pattern of names, dots and `(a|b)` matches; None of any other."""
    tokens = TOKEN.findall(pattern)
    if "".join(tokens) != pattern:
        return None
    texts, rest = choices(tokens)
    return None if rest else texts


def choices(tokens: list[str]) -> tuple[list[str], list[str]]:
    """Return the texts of `a|b|...` up to a closing bracket, and the tokens from there on."""
    found: list[str] = []
    parts: list[list[str]] = []
    while tokens and tokens[0] != ")":
        token, *tokens = tokens
        if token in ("(", "(?:"):
            inner, tokens = choices(tokens)
            parts.append(inner)
            tokens = tokens[1:]
        elif token == "|":
            found += ["".join(part) for part in product(*parts)]
            parts = []
        elif token != "$":
            parts.append([token.removeprefix("\\")])
    return found + ["".join(part) for part in product(*parts)], tokens


def exists(name: str) -> bool:
    """Return whether a layer can have it: no attention has an MLP's weights, nor the reverse."""
    *parents, end = name.split(".")
    if ABSENT in parents:
        return False
    if any(parent in ATTENTION for parent in parents):
        return end not in MLP_ENDS
    return "mlp" not in parents or end not in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
