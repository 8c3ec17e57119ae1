"""The strategy that reads a source's rows, built from the source's options."""

from collections.abc import Callable

import numpy as np

from headrace.dataprep.axolotl.build_chat import chat, pictured_chat, sharegpt
from headrace.dataprep.axolotl.build_pairs import bradley_terry, labeled_answers, orpo, text_pairs
from headrace.dataprep.axolotl.dialogues import Llama2Chat, Messages, Pygmalion
from headrace.dataprep.axolotl.instruct import USER_DEFINED, Instruct, Reflection, UserDefined
from headrace.dataprep.axolotl.plain import Completion, InputOutput, Pretrain
from headrace.dataprep.axolotl.prompts import (
    check_format,
    instruct_types,
    prompt_texts,
    split_type,
    styles,
    unknown,
)
from headrace.dataprep.axolotl.row_format import AxolotlFormat
from headrace.dataprep.axolotl.strategy import Strategy, TokenRules
from headrace.dataprep.axolotl.turns import property_names
from headrace.dataprep.text.row_format import Format
from headrace.dataprep.text.tokenizer import open_tokenizer
from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.schemas.errors import ConfigError
from headrace.schemas.prepare.axolotl_config import AxolotlConfig, CustomType
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.prepare.source_config import SourceConfig

NAMED_STYLES = ("instruct", "chat", "chatml", "phi")
ONE_STYLE = ("concisechoice", "summarizetldr")  # whatever style is named


def build_axolotl_format(
    config: PrepareConfig, source: SourceConfig, tokenizer: TokenizerSpec
) -> Format:
    """The row format of a source of `type = "axolotl"`.

    Raises:
        ConfigError: its options cannot be followed.
    """
    options = source.axolotl
    assert options is not None
    try:
        strategy: Strategy
        if source.engine == "axolotl":
            from headrace.dataprep.axolotl.engine import EngineStrategy

            strategy = EngineStrategy(options, tokenizer, config.sequence_len)
        else:
            rules = token_rules(tokenizer, config.sequence_len, options.train_on_inputs)
            strategy = (
                build_strategy(options, rules)
                if config.images is None
                else pictured_chat(options, rules, config.images)
            )
    except ConfigError as error:
        raise ConfigError(f'source "{source.name}": {error}') from None
    return AxolotlFormat(strategy, tokenizer, options, config.sequence_len, config.seed)


def build_strategy(config: AxolotlConfig, rules: TokenRules) -> Strategy:
    """The strategy of a type with its options.

    Raises:
        ConfigError: no such type or style, or options that do not go together.
    """
    if config.rl == "kto":
        return labeled_answers(config, rules)
    if config.rl is not None:
        return text_pairs(config, rules)
    if isinstance(config.type, CustomType):
        return user_defined(config.type, rules)
    name, style = split_type(config.type)
    if name in instruct_types():
        return instruct(name, style, config.conversation, rules)
    if name in REFUSED:
        raise ConfigError(f'axolotl type "{config.type}" {REFUSED[name]}')
    build = OTHERS.get(name)
    if build is None:
        raise unknown("type", config.type, [*instruct_types(), *OTHERS])
    return build(config, rules, style)


def instruct(name: str, style: str | None, conversation: str | None, rules: TokenRules) -> Instruct:
    """A type of the instruction family in one of the styles."""
    kind = instruct_types()[name]
    wanted = conversation if name == "alpaca_chat" else style
    if wanted is None or name in ONE_STYLE:
        return Instruct(rules, kind, styles()[kind.style])
    if wanted not in NAMED_STYLES or not (kind.styled or name == "alpaca_chat"):
        raise unknown("type", f"{name}:{wanted}", styled_names())
    return Instruct(rules, kind, styles()[wanted])


def styled_names() -> list[str]:
    """Every type of the instruction family, and those of several styles with each."""
    kinds = instruct_types()
    styled = [name for name, kind in kinds.items() if kind.styled]
    return [*kinds, *(f"{name}:{style}" for name in styled for style in NAMED_STYLES)]


def user_defined(kind: CustomType, rules: TokenRules) -> UserDefined:
    """A type that is a table of columns and formats."""
    given = kind.model_dump(include=set(USER_DEFINED), exclude_none=True)
    options = USER_DEFINED | given
    check_format("format", options["format"], {"instruction", "input"})
    check_format("no_input_format", options["no_input_format"], {"instruction"})
    check_format("system_format", options["system_format"], {"system"})
    return UserDefined(rules, options)


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
            "content": [mapping["content"]]
            if "content" in mapping
            else ["value", "text", "content"],
            "weight": [training] if training else ["train", "weight"],
        },
        template.startswith("llama3"),
    )


REFUSED = {
    "stepwise_supervised": "gives each step a class for a process reward model, which shards of "
    "tokens cannot hold; remove the source",
    "_synthetic": "makes random ids, no data; remove the source",
}
OTHERS: dict[str, Callable[[AxolotlConfig, TokenRules, str | None], Strategy]] = {
    "completion": lambda config, rules, _: Completion(rules, config.field or "text"),
    "pretrain": lambda config, rules, _: Pretrain(rules, config.text_column or "text"),
    "input_output": lambda config, rules, _: InputOutput(rules),
    "reflection": reflection,
    "pygmalion": lambda config, rules, _: Pygmalion(rules),
    "llama2_chat": lambda config, rules, _: Llama2Chat(rules),
    "chat_template": chat,
    "orpo.chat_template": orpo,
    "bradley_terry.chat_template": bradley_terry,
    **dict.fromkeys(("sharegpt", "sharegpt.load_role", "sharegpt.load_guanaco"), sharegpt),
    **dict.fromkeys(("sharegpt_simple", "sharegpt_simple.load_role"), sharegpt),
    **dict.fromkeys(("sharegpt_simple.load_guanaco", "sharegpt_jokes"), sharegpt),
    "messages": messages,
    "messages.chat": messages,
}


def token_rules(spec: TokenizerSpec, sequence_len: int, train_on_inputs: bool) -> TokenRules:
    """Read from the tokenizer what it adds."""
    encoding = open_tokenizer(spec, True).encode("a", add_special_tokens=True)
    added = np.array(encoding.special_tokens_mask, dtype=bool)
    text = np.flatnonzero(~added)
    first, last = (int(text[0]), int(text[-1])) if len(text) else (len(added), len(added))
    special = dict(spec.special_tokens)
    return TokenRules(
        spec=spec,
        sequence_len=sequence_len,
        train_on_inputs=train_on_inputs,
        before=tuple(encoding.ids[:first]),
        after=tuple(encoding.ids[last + 1 :]),
        bos=special.get("bos"),
        eos=special.get("eos"),
    )
