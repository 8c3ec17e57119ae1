"""Chat templates: rendered as transformers 5.23 does, but the same each time and within limits."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from headrace.dataprep.text.rendering import REASONING, Message, Rendering, TemplateRefusedError
from headrace.dataprep.text.template_environment import (
    NUMBER_OF_TURN,
    Environment,
    TurnMarks,
    holds_marks,
    read_marks,
)
from headrace.dataprep.text.template_limits import limited
from headrace.schemas.errors import DataError

LONGEST = 1 << 20  # characters of a template; published ones have up to 20,000


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
        if len(text) > LONGEST:
            raise DataError(f"{name}: {len(text)} characters, more than {LONGEST}; correct it")
        environment = Environment(parse_date(name, date), name)
        try:
            with limited(name, "compiling it"):
                self.template = environment.compile_marked(text)
        except jinja2.TemplateError as error:
            line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise DataError(f"{name}{line}: {error}; correct the chat template") from None
        except (RecursionError, SyntaxError, ValueError) as error:
            raise DataError(
                f"{name}: cannot be compiled ({type(error).__name__}: {error}); correct the chat "
                "template"
            ) from None
        self.asks = "add_generation_prompt" in text

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, ask: bool = False
    ) -> Rendering:
        """One conversation as text.

        Args:
            ask: end with what stands before an answer, the generation prompt.

        Raises:
            TemplateRefusedError: the template raised, or does not work with these messages.
            DataError: it takes too long or too much memory, or does what it must not.
        """
        values = {"documents": None, "add_generation_prompt": False} | self.variables
        values |= {"add_generation_prompt": True} if ask else {}
        plain = [alias_reasoning(message) for message in messages]
        if holds_marks([plain, tools]):
            raise TemplateRefusedError("U+FDD0 to U+FDD3 are no text")
        values |= {"messages": plain, "tools": tools, NUMBER_OF_TURN: TurnMarks(plain)}
        try:
            with limited(self.name):
                return read_marks(self.template.render(values), len(plain))
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
            message = str(error) or type(error).__name__
            raise TemplateRefusedError(message, isinstance(error, TypeError)) from None


def alias_reasoning(message: Message) -> Message:
    """A message with its reasoning under all names that templates read, and no None values but of
    its content."""
    if message.keys().isdisjoint(REASONING) and None not in message.values():
        return dict(message)
    message = {k: value for k, value in message.items() if value is not None or k == "content"}
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
