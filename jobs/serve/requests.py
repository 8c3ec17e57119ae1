"""Requests in OpenAI's form, of which unknown and unsupported parts are refused by name."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headrace.schemas.errors import DataError
from headrace.trainer.export.sample import Sampling

MOST_STOPS, MOST_TOKENS, USUAL_TOKENS = 16, 1 << 20, 256
IGNORED = frozenset(
    ("user", "metadata", "store", "stream_options", "service_tier", "safety_identifier")
)


class Request(BaseModel):
    """Fields that all three forms share."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: str | list[str] | None = Field(None, max_length=MOST_STOPS)
    stream: bool = False
    n: Literal[1] = 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the stop texts, empty ones left out."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def limit(self) -> int | None:
        """Return the most tokens of an answer, where the request says so."""
        return self.max_tokens

    def sampling(self) -> Sampling:
        """Return how tokens are chosen. OpenAI's default temperature is 1."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(self.limit or USUAL_TOKENS, temperature, self.seed or 0, self.top_p)


class Message(BaseModel):
    """A turn: a text, or parts that are texts."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str | list[dict[str, Any]]
    name: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the turn as chat templates take it.

        Raises:
            DataError: a part that is no text.
        """
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        if any(part.get("type") != "text" for part in self.content):
            raise DataError("messages: parts of other types than text are not answered")
        return {"role": self.role, "content": "".join(str(p.get("text")) for p in self.content)}


class ChatRequest(Request):
    """Body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)

    @property
    def limit(self) -> int | None:
        """Return the most tokens; the newer name goes first."""
        return self.max_completion_tokens or self.max_tokens


class TextRequest(Request):
    """Body of `/v1/completions`, and of `/generate`."""

    prompt: str = Field(min_length=1)


def parse(kind: type[Request], body: Any) -> Any:
    """Return a request.

    Raises:
        DataError: what is wrong with it, or what this server does not do.
    """
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise DataError(f"{where}: {first['msg']}") from None
    extra = {
        key for key, value in (request.model_extra or {}).items() if value not in (None, [], {})
    }
    if unknown := sorted(extra - IGNORED):
        raise DataError(f"{unknown[0]} is not supported here; leave it out")
    return request
