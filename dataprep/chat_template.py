"""Chat templates: rendered as transformers 5.23 does, but the same each time and within a limit."""

import datetime
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.schemas.errors import DataError

Message = dict[str, Any]
Span = tuple[int, int]  # characters [start, end) of a rendering

SECONDS = 2.0  # of processor time for one conversation; it mostly takes less than a millisecond
LARGEST = 1 << 24  # characters of a repeated string, or bits of a power
RESERVED = "\ufdd0\ufdd1\ufdd2\ufdd3"  # noncharacters: Unicode keeps them for internal use
GENERATION = re.compile("[\ufdd0\ufdd1]")
REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateRefusedError(Exception):
    """A template cannot render one conversation, or says so itself."""


class TooSlow(BaseException):
    """The time for one rendering is over; no Exception, so that nothing on the way catches it."""


class Rendering(NamedTuple):
    """A conversation as text, and what the template marks with `{% generation %}`."""

    text: str
    generated: list[Span]


class ChatTemplate:
    """One compiled template.

    Args:
        name: what error messages call it.
        variables: given to each rendering: the special tokens' texts, and the config's arguments.
        date: what `strftime_now` takes for now.

    Raises:
        DataError: the text is no Jinja template, or uses what is not deterministic.
    """

    def __init__(
        self, name: str, text: str, variables: Mapping[str, Any], date: str | None = None
    ) -> None:
        self.name = name
        self.variables = dict(variables)
        environment = Environment(parse_date(name, date), name)
        try:
            self.template = environment.from_string(text)
        except jinja2.TemplateError as error:
            line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise DataError(f"{name}{line}: {error}; correct the chat template") from None

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Rendering:
        """One conversation as text.

        Raises:
            TemplateRefusedError: the template raised, or does not work with these messages.
            DataError: it takes too long, or does what it must not.
        """
        values = {"documents": None, "add_generation_prompt": False} | self.variables
        plain = [alias_reasoning(message) for message in messages]
        try:
            with time_limit(self.name):
                return find_generated(self.template.render(messages=plain, tools=tools, **values))
        except SecurityError as error:
            raise DataError(f"{self.name}: {error}; correct the chat template") from None
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise TemplateRefusedError(str(error) or type(error).__name__) from None


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox with the names that templates expect, less what is random or endless."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self, date: datetime.datetime | None, name: str) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )

        def strftime_now(format: str) -> str:  # noqa: A002  as templates may call it
            if date is None:
                raise DataError(
                    f"{name}: asks for today's date, so tokens would change from day to day; "
                    'set date = "YYYY-MM-DD" in [sources.chat]'
                )
            return date.strftime(format)

        del self.globals["lipsum"], self.filters["random"]
        self.filters["tojson"] = to_json
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = strftime_now

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Refuse at once what is only found out later by the sandbox, or never."""
        raise SecurityError(
            f"access to attribute {attribute!r} of a {type(obj).__name__} is not allowed"
        )

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Repetition and powers up to a size that memory can hold."""
        if operator == "**":
            size = abs(right) * abs(left).bit_length() if isinstance(left, int) else 0
        else:
            text, count = (left, right) if isinstance(right, int) else (right, left)
            size = len(text) * count if hasattr(text, "__len__") else 0
        if size > LARGEST:
            raise SecurityError(f"a result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


class Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`, kept as a pair of reserved characters."""

    tags = {"generation"}  # noqa: RUF012  as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block as a call of `mark` with its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Any) -> str:
        """The body between its marks."""
        return f"\ufdd0{caller()}\ufdd1"


def find_generated(text: str) -> Rendering:
    """Take the marks of generation out of a text, and say where they were."""
    parts = GENERATION.split(text)
    spans: list[Span] = []
    position, start = 0, 0
    for part, mark in zip(parts, GENERATION.findall(text), strict=False):
        position += len(part)
        if mark == "\ufdd0":
            start = position
        else:
            spans.append((start, position))
    return Rendering("".join(parts), spans)


@contextmanager
def time_limit(name: str) -> Iterator[None]:
    """Stop what takes longer than SECONDS of this process's own time, on any loaded machine.

    Raises:
        DataError: it did; or this is not the main thread, which alone can be stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        raise DataError(
            f"{name}: chat templates are only rendered in a process's main thread, where an "
            "endless one can be stopped; call prepare there, or with more than one worker"
        )
    if signal.getsignal(signal.SIGVTALRM) is not stop_rendering:
        signal.signal(signal.SIGVTALRM, stop_rendering)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except TooSlow:
        raise DataError(
            f"{name}: one conversation took more than {SECONDS:g} s; correct the chat template, "
            "which may loop without end"
        ) from None


def stop_rendering(number: int, frame: FrameType | None) -> None:
    """Stop a rendering at the end of its time (a signal handler)."""
    raise TooSlow


def raise_exception(message: str) -> None:
    """Let a template refuse a conversation."""
    raise jinja2.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes of HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def alias_reasoning(message: Message) -> Message:
    """A message with its reasoning under all names that templates read, and no None values."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def parse_date(name: str, date: str | None) -> datetime.datetime | None:
    """The day that a config names."""
    try:
        return None if date is None else datetime.datetime.strptime(date, "%Y-%m-%d")
    except ValueError:
        raise DataError(f'{name}: date = "{date}" is not a day; write it as YYYY-MM-DD') from None


def read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """A tokenizer's templates by name; a single one is "default".

    Args:
        settings: its `tokenizer_config.json`, over which files of their own go.
    """
    found = settings.get("chat_template")
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if (folder / "chat_template.jinja").is_file():
        default = (folder / "chat_template.jinja").read_text(encoding="utf-8-sig")
        return {"default": default} | {f.stem: f.read_text(encoding="utf-8-sig") for f in files}
    if isinstance(found, str):
        return {"default": found}
    entries = found if isinstance(found, list) else []
    return {
        entry["name"]: entry["template"]
        for entry in entries
        if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
    }
