"""Prompts of conversations, by a model's chat template and within its limits of time and memory."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headrace.dataprep.text.chat_template import ChatTemplate, read_templates
from headrace.dataprep.text.rendering import TemplateRefusedError
from headrace.dataprep.text.tokenizer import CONFIG_NAMES, read_json
from headrace.dataprep.text.tokenizer_spec import token_texts
from headrace.schemas.errors import ConfigError, DataError


def chat_prompt(model: Path) -> Callable[[list[dict[str, Any]]], str]:
    """Return what renders a conversation up to its answer; the template is read when first asked.

    Today's date is given to templates that ask for it.
    """
    compiled: list[ChatTemplate] = []

    def render(messages: list[dict[str, Any]]) -> str:
        if not all(isinstance(message, dict) for message in messages):
            raise DataError(f"{model}: messages must be objects with role and content")
        if not compiled:
            compiled.append(compile_template(model))
        try:
            return compiled[0].render(messages, ask=True).text
        except TemplateRefusedError as error:
            raise DataError(
                f"{compiled[0].name}: it refuses the conversation ({error}); correct the messages"
            ) from None

    return render


def compile_template(model: Path) -> ChatTemplate:
    """Return a model directory's default chat template, compiled.

    Raises:
        ConfigError: it has none.
        DataError: one that cannot be used.
    """
    templates = read_templates(model, read_json(model / CONFIG_NAMES[0]))
    if "default" not in templates:
        raise ConfigError(f"{model}: its tokenizer has no chat template")
    today = datetime.date.today().isoformat()
    return ChatTemplate(f"{model}: chat template", templates["default"], token_texts(model), today)
