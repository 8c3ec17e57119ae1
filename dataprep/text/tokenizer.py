"""A model directory's tokenizer: ids of documents, with BOS and EOS where they are wanted."""

import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer

from headrace.dataprep.text.chat_template import read_templates
from headrace.schemas.errors import DataError
from headrace.schemas.outside_text import OutsideTextError, parse_json, read_bytes, read_text
from headrace.schemas.prepare.prepare_config import PrepareConfig, TokenizerBackend

Ids = npt.NDArray[np.int32]
TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAMES = ("tokenizer_config.json", "special_tokens_map.json")
ROLES = ("bos", "eos", "pad", "unk")
TEMPLATE_ROLES = (*ROLES, "sep", "cls", "mask")


@dataclass(frozen=True)
class TokenizerSpec:
    """Everything a worker needs to tokenize: small, picklable, and all that decides the ids."""

    file: str = field(compare=False)  # copies of it are the same tokenizer
    file_sha256: str
    sha256: str  # of the content as it is used: with the tokens that the config adds
    vocabulary_size: int
    special_tokens: tuple[tuple[str, int], ...]
    bos: int | None
    eos: int | None
    parse_special_tokens: bool
    backend: TokenizerBackend = "tokenizers"
    token_texts: tuple[tuple[str, str], ...] = ()
    chat_templates: tuple[tuple[str, str], ...] = ()
    added_tokens: tuple[tuple[str, bool], ...] = ()  # text, and whether it is special
    stops: tuple[int, ...] = ()  # all that generation_config.json calls EOS

    @property
    def folder(self) -> str:
        """The directory it was read from."""
        return str(Path(self.file).parent)

    def identity(self) -> dict[str, object]:
        """Everything but path and backend: equal identities give equal ids."""
        return {
            "sha256": self.sha256,
            "special_tokens": dict(self.special_tokens),
            "bos": self.bos,
            "eos": self.eos,
            "parse_special_tokens": self.parse_special_tokens,
            "token_texts": dict(self.token_texts),
            "chat_templates": dict(self.chat_templates),
            "stops": list(self.stops),
        }


def read_spec(config: PrepareConfig) -> TokenizerSpec:
    """Read the tokenizer that the config names.

    Raises:
        DataError: no tokenizer there, damaged, or without a BOS or EOS that the config asks for.
    """
    folder = Path(config.tokenizer)
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        raise DataError(f"{path}: not found; set tokenizer to a directory with {TOKENIZER_NAME}")
    added = added_tokens(config)
    try:
        raw = read_bytes(path)
        content = add_tokens(raw, added)
        tokenizer = Tokenizer.from_str(content.decode())
    except BaseException as error:
        if not is_of_tokenizer(error):
            raise
        raise DataError(f"{path}: not a tokenizer ({error}); replace the file") from None
    special = special_tokens(folder, tokenizer)
    for role, text in config.special_tokens.items():
        number = tokenizer.token_to_id(text)
        assert number is not None, "it has been added"
        special[role.removesuffix("_token")] = number
    named = token_texts(folder)
    named.update((role, text) for role, text in config.special_tokens.items())
    return TokenizerSpec(
        file=str(path),
        file_sha256=hashlib.sha256(raw).hexdigest(),
        sha256=hashlib.sha256(content).hexdigest(),
        vocabulary_size=max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        special_tokens=tuple(sorted(special.items())),
        bos=choose_bos(config, tokenizer, special.get("bos")),
        eos=choose_eos(config, special.get("eos")),
        parse_special_tokens=config.parse_special_tokens,
        backend=config.tokenizer_backend,
        token_texts=tuple(named.items()),
        chat_templates=tuple(read_templates(folder, read_json(folder / CONFIG_NAMES[0])).items()),
        added_tokens=added,
        stops=read_stops(folder),
    )


def read_stops(folder: Path) -> tuple[int, ...]:
    """The tokens at which a model stops, as its generation config lists them."""
    named = read_json(folder / "generation_config.json").get("eos_token_id")
    found = named if isinstance(named, list) else [named]
    return tuple(number for number in found if isinstance(number, int) and 0 <= number < 1 << 31)


def is_of_tokenizer(error: BaseException) -> bool:
    """Return whether an error is one of the library's or of what it reads.

    Its bindings raise plain Exception, and what its own language calls a panic, which is none.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def added_tokens(config: PrepareConfig) -> tuple[tuple[str, bool], ...]:
    """The tokens that a config wants to be there, and which of them are special."""
    special = [(text, True) for text in config.special_tokens.values()]
    return (*special, *((text, False) for text in config.added_tokens))


def add_tokens(content: bytes, added: tuple[tuple[str, bool], ...]) -> bytes:
    """A `tokenizer.json` with further tokens; those that are there already keep their ids."""
    if not added:
        return content
    tokenizer = Tokenizer.from_str(content.decode())
    for text, special in added:
        token = AddedToken(text, normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    return tokenizer.to_str(pretty=True).encode()


def choose_bos(config: PrepareConfig, tokenizer: Tokenizer, bos: int | None) -> int | None:
    """The id that starts a document, or None. `auto` does what the tokenizer itself does."""
    if config.bos == "always" and bos is None:
        raise DataError(
            f'{config.tokenizer}: bos = "always", but no BOS token is named in '
            'tokenizer_config.json; name it there as "bos_token", or set bos = "never"'
        )
    if config.bos == "auto":
        own = tokenizer.encode("a", add_special_tokens=True).ids
        return bos if bos is not None and own[:1] == [bos] else None
    return bos if config.bos == "always" else None


def choose_eos(config: PrepareConfig, eos: int | None) -> int | None:
    """The id that ends a document, or None."""
    if config.eos == "never":
        return None
    if eos is None:
        raise DataError(
            f'{config.tokenizer}: eos = "auto", but no EOS token is named in '
            'tokenizer_config.json; name it there as "eos_token", or set eos = "never"'
        )
    return eos


def token_texts(folder: Path) -> dict[str, str]:
    """The special tokens as chat templates know them: `bos_token` and so on, each as text."""
    found: dict[str, str] = {}
    for name in CONFIG_NAMES:
        values = read_json(folder / name)
        for role in TEMPLATE_ROLES:
            text = token_text(values.get(f"{role}_token"))
            if text is not None:
                found.setdefault(f"{role}_token", text)
    return found


def token_text(token: object) -> str | None:
    """A token that a config names, as text or with its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def special_tokens(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the special tokens by role, from the first file of the directory that names each."""
    found: dict[str, int] = {}
    for name in CONFIG_NAMES:
        values = read_json(folder / name)
        for role in ROLES:
            text = token_text(values.get(f"{role}_token"))
            if role in found or text is None:
                continue
            number = tokenizer.token_to_id(text)
            if number is None:
                raise DataError(
                    f'{folder / name}: {role}_token "{text}" is not in {TOKENIZER_NAME}; correct it'
                )
            found[role] = number
    for name in ("generation_config.json", "config.json"):
        values = read_json(folder / name)
        for role in ROLES:
            value = values.get(f"{role}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and has_id(tokenizer, value):
                found.setdefault(role, value)
    return found


def has_id(tokenizer: Tokenizer, number: object) -> TypeGuard[int]:
    """Return whether a number of a config is a token's; some write -1 for none."""
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 32:
        return False
    return tokenizer.id_to_token(number) is not None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        values = parse_json(read_text(path))
    except OutsideTextError as error:
        raise DataError(f"{path}: {error}; replace the file") from None
    return values if isinstance(values, dict) else {}


@functools.lru_cache(maxsize=4)
def open_tokenizer(spec: TokenizerSpec, parse_special_tokens: bool) -> Tokenizer:
    """The tokenizer itself, kept per process; it neither truncates nor pads."""
    tokenizer = Tokenizer.from_str(read_content(spec).decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not parse_special_tokens
    return tokenizer


@functools.lru_cache(maxsize=4)
def control_ids(spec: TokenizerSpec) -> frozenset[int]:
    """The tokens that are no text: those the tokenizer calls special, and EOS."""
    added = open_tokenizer(spec, True).get_added_tokens_decoder()
    eos = {number for role, number in spec.special_tokens if role == "eos"}
    return frozenset(eos | {number for number, token in added.items() if token.special})


def control_texts(spec: TokenizerSpec) -> dict[int, str]:
    """The tokens that are no text, with what stands for them."""
    tokenizer = open_tokenizer(spec, True)
    return {number: tokenizer.id_to_token(number) or "" for number in control_ids(spec)}


def stop_ids(spec: TokenizerSpec) -> frozenset[int]:
    """The tokens at which generation stops."""
    return frozenset(
        [*spec.stops, *(number for role, number in spec.special_tokens if role == "eos")]
    )


def read_content(spec: TokenizerSpec) -> bytes:
    """The bytes of `tokenizer.json`, if they are still those that the run began with."""
    content = Path(spec.file).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found == spec.sha256:  # the copy beside the shards has the added tokens
        return content
    if found != spec.file_sha256:
        raise DataError(f"{spec.file}: changed while it was in use; run again")
    return add_tokens(content, spec.added_tokens)


class Located(NamedTuple):
    """Ids of a text, and for each token the characters [start, end) that it came from."""

    ids: Ids
    starts: Ids
    ends: Ids
