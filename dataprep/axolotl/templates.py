"""The chat template that a source means: the tokenizer's, one of Axolotl's own, or its own text."""

import difflib
import functools
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2.nodes

from headrace.dataprep.formats.picture_template import open_template
from headrace.dataprep.text.chat_template import ChatTemplate
from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.schemas.errors import ConfigError
from headrace.schemas.prepare.axolotl_config import AxolotlConfig

OWN = "tokenizer_default"
FALLBACK = "tokenizer_default_fallback_"


@functools.cache
def named_templates() -> dict[str, str]:
    """The templates that Axolotl brings, by name."""
    text = files("headrace.dataprep.axolotl").joinpath("chat_templates.json").read_text("utf-8")
    return {name: value for name, value in json.loads(text).items() if name != "origin"}


def choose_template(
    config: AxolotlConfig, spec: TokenizerSpec, marker: str | None = None
) -> ChatTemplate:
    """The compiled template of a source.

    Args:
        marker: what it writes for a picture, where there may be some.

    Raises:
        ConfigError: there is none of that name, or the tokenizer has none.
        DataError: it is no Jinja template.
    """
    name, text = template_text(config, spec)
    if config.default_system_message and name == "chatml":
        text = text.replace("You are a helpful assistant.", config.default_system_message)
    variables: dict[str, Any] = dict(spec.token_texts) | (config.chat_template_kwargs or {})
    return open_template(marker, name, text, variables, config.date)


def template_text(config: AxolotlConfig, spec: TokenizerSpec) -> tuple[str, str]:
    """A name for messages, and the template's text."""
    choice = config.chat_template
    if config.chat_template_jinja and choice in (None, "jinja"):
        return "chat_template_jinja", config.chat_template_jinja
    if choice == "jinja":
        raise ConfigError('chat_template = "jinja" needs chat_template_jinja, the template itself')
    choice = choice or OWN
    own = dict(spec.chat_templates).get("default")
    if choice.startswith(OWN) and own is not None:
        return f"{spec.folder}: chat template", own
    if choice == OWN:
        raise ConfigError(
            f"{spec.folder}: the tokenizer has no chat template; set chat_template, for example to "
            '"chatml"'
        )
    choice = choice.removeprefix(FALLBACK)
    if choice not in named_templates():
        near = difflib.get_close_matches(choice, named_templates(), n=1, cutoff=0)
        raise ConfigError(
            f'chat_template = "{choice}" is not known; it may be "{OWN}", "jinja", or a name that '
            f'docs/axolotl.md lists; nearest: "{near[0]}"'
        )
    return choice, named_templates()[choice]


def read_jinja(text: str) -> str:
    """A template given as text, or in the file of that name."""
    if "{" in text or "\n" in text or not Path(text).is_file():
        return text
    return Path(text).read_text(encoding="utf-8-sig")


def message_properties(template: ChatTemplate, text: str) -> frozenset[str]:
    """The properties that a template reads of its variable `message`, nested ones included."""
    tree = template.template.environment.parse(text)
    return frozenset(
        name
        for node in tree.find_all((jinja2.nodes.Getattr, jinja2.nodes.Getitem))
        if base_name(node) == "message" and isinstance(name := property_name(node), str)
    )


def base_name(node: jinja2.nodes.Node) -> str | None:
    """The variable at the root of a chain of properties."""
    while isinstance(node, jinja2.nodes.Getattr | jinja2.nodes.Getitem):
        node = node.node
    return node.name if isinstance(node, jinja2.nodes.Name) else None


def property_name(node: jinja2.nodes.Expr) -> object:
    """The property that a node reads, where it is written out."""
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr
    argument = node.arg if isinstance(node, jinja2.nodes.Getitem) else None
    return argument.value if isinstance(argument, jinja2.nodes.Const) else None
