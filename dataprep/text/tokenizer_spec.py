"""The tokenizer that a config names: its special tokens, templates and stops."""

import hashlib
from pathlib import Path
from typing import TypeGuard

from tokenizers import Tokenizer

from headrace.dataprep.text.chat_template import read_templates
from headrace.dataprep.text.special_pieces import makes_special, special_texts
from headrace.dataprep.text.tokenizer import CONFIG_NAMES, TOKENIZER_NAME, add_tokens, read_json
from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.schemas.errors import DataError
from headrace.schemas.outside_text import read_bytes
from headrace.schemas.prepare.prepare_config import PrepareConfig

ROLES = ("bos", "eos", "pad", "unk")
OTHER_FORMS = ("*.model", "*.tiktoken")  # of a tokenizer
TEMPLATE_ROLES = (*ROLES, "sep", "cls", "mask")


def read_spec(config: PrepareConfig) -> TokenizerSpec:
    """Read the tokenizer that the config names.

    Raises:
        DataError: no tokenizer there, damaged, or without a BOS or EOS that the config asks for.
    """
    folder = Path(config.tokenizer)
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        remedy = f"set tokenizer to a directory with {TOKENIZER_NAME}"
        if any(any(folder.glob(name)) for name in OTHER_FORMS):
            remedy = f"run headrace convert-tokenizer {folder}, which writes it"
        raise DataError(f"{path}: not found; {remedy}")
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
    ends = {special[role] for role in ("bos", "eos") if role in special}
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
        token_texts=tuple(named.items()),
        chat_templates=tuple(read_templates(folder, read_json(folder / CONFIG_NAMES[0])).items()),
        added_tokens=added,
        stops=read_stops(folder),
        makes_special=makes_special(tokenizer, special_texts(tokenizer, ends)),
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
