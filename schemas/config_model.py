"""Base of all config tables, and the types of their values."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StringConstraints


def check_characters(text: str) -> str:
    """Return a text that can be a name or a path.

    Raises:
        ValueError: it holds a NUL, or half a surrogate pair, which no file can be called.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is no Unicode text; correct it") from None
    if "\0" in text:
        raise ValueError(f"character {text.index(chr(0))} is NUL; remove it")
    return text


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(check_characters)]


def no_truth_value(value: object) -> object:
    """Literals are told apart by `==`, for which true is 1.

    Raises:
        ValueError: true or false.
    """
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    return value


IsNumber = BeforeValidator(no_truth_value)


class Config(BaseModel):
    """Base of all config tables: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )
