"""From a source's options to the strategy that reads its rows."""

import difflib
from collections.abc import Callable

from headrace.dataprep.axolotl.dialogues import Llama2Chat, Messages, Pygmalion
from headrace.dataprep.axolotl.instruct import USER_DEFINED, Instruct, Reflection, UserDefined
from headrace.dataprep.axolotl.plain import Completion, InputOutput, Pretrain
from headrace.dataprep.axolotl.prompts import (
    Style,
    instruct_types,
    placeholders,
    prompt_texts,
    styles,
)
from headrace.dataprep.axolotl.strategy import Strategy, TokenRules
from headrace.schemas.axolotl_config import AxolotlConfig, CustomType
from headrace.schemas.errors import ConfigError

NAMED_STYLES = ("instruct", "chat", "chatml", "phi")


def build_strategy(config: AxolotlConfig, rules: TokenRules) -> Strategy:
    """The strategy of a type with its options.

    Raises:
        ConfigError: no such type or style, or options that do not go together.
    """
    if isinstance(config.type, CustomType):
        return user_defined(config.type, rules)
    name, style = split_type(config.type)
    if name in instruct_types():
        return instruct(name, style or config.conversation, rules)
    build = OTHERS.get(name)
    if build is None:
        raise unknown("type", config.type, [*instruct_types(), *OTHERS])
    return build(config, rules, style)


def split_type(name: str) -> tuple[str, str | None]:
    """A type without `.load`, and the style after its colon."""
    name = name.replace(":load_", ".load_").removesuffix(".load")
    base, _, style = name.partition(":")
    return base, style or None


def instruct(name: str, style: str | None, rules: TokenRules) -> Instruct:
    """A type of the instruction family in one of the styles."""
    kind = instruct_types()[name]
    chosen = kind.style
    if style is not None and (kind.styled or name == "alpaca_chat"):
        if style not in NAMED_STYLES:
            raise unknown("style", f"{name}:{style}", [f"{name}:{one}" for one in NAMED_STYLES])
        chosen = style
    return Instruct(rules, kind, styles()[chosen])


def user_defined(kind: CustomType, rules: TokenRules) -> UserDefined:
    """A type that is a table of columns and formats."""
    given = kind.model_dump(include=set(USER_DEFINED), exclude_none=True)
    options = USER_DEFINED | given
    check_format("format", options["format"], {"instruction", "input"})
    check_format("no_input_format", options["no_input_format"], {"instruction"})
    check_format("system_format", options["system_format"], {"system"})
    return UserDefined(rules, options)


def check_format(key: str, text: str, known: set[str]) -> None:
    """A user's format may name nothing but the texts there are."""
    try:
        names = set(placeholders(text))
    except ValueError as error:
        raise ConfigError(f'type.{key} = "{text}": {error}; write braces twice to keep them') from None
    if names - known:
        shown = ", ".join(f"{{{name}}}" for name in sorted(known))
        raise ConfigError(
            f'type.{key} = "{text}": {{{min(names - known)}}} is not known; it may hold {shown}'
        )


def reflection(config: AxolotlConfig, rules: TokenRules, style: str | None) -> Reflection:
    """Its texts by style; any other style than its two has no system text."""
    texts = prompt_texts()["reflection"]
    return Reflection(rules, texts.get(style or "plain", texts["plain"]))


def messages(config: AxolotlConfig, rules: TokenRules, style: str | None) -> Messages:
    """ChatML or Llama 3 headers."""
    template = config.chat_template or "chatml"
    if template != "chatml" and not template.startswith("llama3"):
        raise ConfigError(
            f'type "messages" with chat_template = "{template}": it knows chatml and llama3; '
            'set type = "chat_template"'
        )
    mapping = property_names(config)
    training = config.message_field_training
    return Messages(
        rules,
        config.field_messages or "messages",
        {
            "role": [mapping["role"]] if "role" in mapping else ["role", "from"],
            "content": [mapping["content"]] if "content" in mapping else ["value", "text", "content"],
            "weight": [training] if training else ["train", "weight"],
        },
        template.startswith("llama3"),
    )


def property_names(config: AxolotlConfig) -> dict[str, str]:
    """The mapping of message properties, with the older names of two of them."""
    mapping = dict(config.message_property_mappings or {})
    for key, old in (
        ("role", config.message_field_role),
        ("content", config.message_field_content),
    ):
        if old is not None and mapping.setdefault(key, old) != old:
            raise ConfigError(
                f'message_field_{key} = "{old}" and message_property_mappings.{key} = '
                f'"{mapping[key]}" differ; remove one'
            )
    return mapping


def unknown(what: str, name: str, known: list[str]) -> ConfigError:
    """No such type or style, with the nearest there is."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return ConfigError(f'axolotl {what} "{name}" is not known; nearest: "{near[0]}"')


OTHERS: dict[str, Callable[[AxolotlConfig, TokenRules, str | None], Strategy]] = {
    "completion": lambda config, rules, _: Completion(rules, config.field or "text"),
    "pretrain": lambda config, rules, _: Pretrain(rules, config.text_column or "text"),
    "input_output": lambda config, rules, _: InputOutput(rules),
    "reflection": reflection,
    "pygmalion": lambda config, rules, _: Pygmalion(rules),
    "llama2_chat": lambda config, rules, _: Llama2Chat(rules),
    "messages": messages,
    "messages.chat": messages,
}
