"""From a source's options to the strategy that reads its rows."""

import difflib
from collections.abc import Callable
from dataclasses import replace

from headrace.dataprep.axolotl.chat import ChatStrategy, TrainRules
from headrace.dataprep.axolotl.dialogues import Llama2Chat, Messages, Pygmalion
from headrace.dataprep.axolotl.instruct import USER_DEFINED, Instruct, Reflection, UserDefined
from headrace.dataprep.axolotl.plain import Completion, InputOutput, Pretrain
from headrace.dataprep.axolotl.preference import (
    CUSTOM_PAIR,
    LAYOUTS,
    ArgillaPairs,
    BradleyTerryStages,
    CustomPairs,
    OrpoStages,
    Pair,
    StagedPairs,
    TemplatePairs,
    TextPairs,
    nectar,
    passthrough,
)
from headrace.dataprep.axolotl.prompts import (
    instruct_types,
    placeholders,
    prompt_texts,
    styles,
)
from headrace.dataprep.axolotl.strategy import AxolotlFormat, Row, Strategy, TokenRules, token_rules
from headrace.dataprep.axolotl.templates import (
    choose_template,
    message_properties,
    named_templates,
    template_text,
)
from headrace.dataprep.axolotl.turns import DEFAULT_ROLES, TurnReader
from headrace.dataprep.chat_template import ChatTemplate
from headrace.dataprep.formats.sample import Format
from headrace.dataprep.tokenizer import TokenizerSpec, encode_texts
from headrace.schemas.axolotl_config import AxolotlConfig, CustomType
from headrace.schemas.errors import ConfigError
from headrace.schemas.prepare_config import PrepareConfig, SourceConfig

NAMED_STYLES = ("instruct", "chat", "chatml", "phi")


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
            strategy = build_strategy(options, rules)
    except ConfigError as error:
        raise ConfigError(f'source "{source.name}": {error}') from None
    return AxolotlFormat(strategy, tokenizer, options, config.sequence_len, config.seed)


def build_strategy(config: AxolotlConfig, rules: TokenRules) -> Strategy:
    """The strategy of a type with its options.

    Raises:
        ConfigError: no such type or style, or options that do not go together.
    """
    if config.rl is not None:
        return TextPairs(rules, pair_reader(config, rules), eos_text(rules))
    if isinstance(config.type, CustomType):
        return user_defined(config.type, rules)
    name, style = split_type(config.type)
    if name in instruct_types():
        return instruct(name, style or config.conversation, rules)
    if name in REFUSED:
        raise ConfigError(f'axolotl type "{config.type}" {REFUSED[name]}')
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
        raise ConfigError(
            f'type.{key} = "{text}": {error}; write braces twice to keep them'
        ) from None
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
            "content": [mapping["content"]]
            if "content" in mapping
            else ["value", "text", "content"],
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


def chat(config: AxolotlConfig, rules: TokenRules, style: str | None) -> ChatStrategy:
    """Conversations through a chat template."""
    template = choose_template(config, rules.spec)
    text = template_text(config, rules.spec)[1]
    reader = turn_reader(config, message_properties(template, text))
    train = train_rules(config, rules, text, reader.roles)
    return ChatStrategy(reader, template, train)


def turn_reader(config: AxolotlConfig, kept: frozenset[str]) -> TurnReader:
    """Where the turns of a row lie."""
    thinking_key = config.template_thinking_key or "reasoning_content"
    names = {"role": "role", "content": "content"} | property_names(config)
    if config.field_thinking:
        names.setdefault(thinking_key, config.field_thinking)
    roles = DEFAULT_ROLES
    if config.roles:
        roles = {alias: role for role, aliases in config.roles.items() for alias in aliases}
    return TurnReader(
        field_messages=config.field_messages or "messages",
        field_tools=config.field_tools or "tools",
        names=names,
        kept=kept,
        roles=roles,
        thinking_key=thinking_key,
        split_thinking=bool(config.split_thinking),
        field_training=config.message_field_training,
        field_detail=config.message_field_training_detail,
        drop_system_message=bool(config.drop_system_message),
    )


def train_rules(
    config: AxolotlConfig, rules: TokenRules, template: str, roles: dict[str, str]
) -> TrainRules:
    """What is trained of a conversation.

    Raises:
        ConfigError: an end-of-turn token is several tokens, or two options differ about EOS.
    """
    eos_text = dict(rules.spec.token_texts).get("eos_token")
    on_eos = config.train_on_eos or "turn"
    on_eot = config.train_on_eot or on_eos
    tokens = [eos_text] if config.eot_tokens is None and eos_text else config.eot_tokens or []
    if tokens != [eos_text]:
        tokens = [token for token in tokens if token in template]
    ids = encode_texts(rules.spec, tokens)
    for token, found in zip(tokens, ids, strict=True):
        if len(found) != 1:
            raise ConfigError(
                f'eot_tokens: "{token}" is {len(found)} tokens, not one; name a token of the '
                'tokenizer, or add it under "tokens"'
            )
    if tokens != [eos_text] and eos_text in tokens and on_eos != on_eot:
        raise ConfigError(
            f'eot_tokens holds EOS, "{eos_text}", but train_on_eos = "{on_eos}" and '
            f'train_on_eot = "{on_eot}" differ; remove one'
        )
    trained = ["assistant"] if config.roles_to_train is None else config.roles_to_train
    return TrainRules(
        roles=frozenset(roles.get(role, role) for role in trained),
        every_role=config.train_on_inputs,
        on_eos=on_eos,
        on_eot=on_eot,
        eos=frozenset([] if rules.eos is None else [rules.eos]),
        eot=frozenset(int(found[0]) for found in ids),
    )


def eos_text(rules: TokenRules) -> str:
    """EOS as text."""
    rules.need_eos()
    return dict(rules.spec.token_texts)["eos_token"]


def pair_reader(config: AxolotlConfig, rules: TokenRules) -> Callable[[Row], Pair]:
    """What reads the chosen and the rejected answer of a row."""
    if isinstance(config.type, CustomType):
        options = CUSTOM_PAIR | config.type.model_dump(include=set(CUSTOM_PAIR), exclude_none=True)
        check_format("prompt_format", options["prompt_format"], {"system", "prompt"})
        check_format("chosen_format", options["chosen_format"], {"chosen"})
        check_format("rejected_format", options["rejected_format"], {"rejected"})
        return CustomPairs(options)
    name = config.type if "." in config.type else f"{config.type}.default"
    if name in LAYOUTS:
        return LAYOUTS[name].read
    match name:
        case "zephyr.nectar":
            return nectar
        case "passthrough.default":
            return passthrough
        case "chat_template.argilla" if config.rl == "orpo":
            return ArgillaPairs(*both_templates(config, rules))
        case "chat_template.default" | "chat_template.argilla_chat":
            return template_pairs(config, rules, whole=name.endswith("argilla_chat"))
    raise unknown(f"type for {config.rl}", name, [*LAYOUTS, *PAIR_TYPES])


PAIR_TYPES = ("zephyr.nectar", "passthrough", "chat_template.default", "chat_template.argilla_chat")


def sharegpt(config: AxolotlConfig, rules: TokenRules, style: str | None) -> ChatStrategy:
    """The ShareGPT family, which Axolotl has removed, as its guide says to write it."""
    assert isinstance(config.type, str)
    base, _, loader = split_type(config.type)[0].partition(".")
    role, content = SHAREGPT_NAMES.get(loader, ("from", "value"))
    names = {"role": role, "content": content} | property_names(config)
    changes: dict[str, object] = {
        "field_messages": config.field_messages or "conversations",
        "message_property_mappings": names,
        "message_field_role": None,
        "message_field_content": None,
        "message_field_training": config.message_field_training or "weight",
        "chat_template": config.chat_template
        or conversation_template(config.conversation or style),
    }
    if loader == "load_guanaco" and config.roles is None:
        changes["roles"] = {"user": ["prompter"], "assistant": ["assistant"]}
    strategy = chat(config.model_copy(update=changes), rules, None)
    reader = replace(strategy.reader, sharegpt=True, jokes=base == "sharegpt_jokes")
    return replace(strategy, reader=reader)


SHAREGPT_NAMES = {"load_role": ("role", "value"), "load_guanaco": ("role", "text")}


def conversation_template(name: str | None) -> str | None:
    """The template that is named like one of fastchat's conversations."""
    if name is None or name in named_templates():
        return name
    raise ConfigError(
        f'conversation = "{name}": its layout came from fastchat, which is gone; set '
        'chat_template, for example to "chatml"'
    )


def both_templates(config: AxolotlConfig, rules: TokenRules) -> tuple[ChatTemplate, ChatTemplate]:
    """The template of a source, and the same ending in the header of an answer."""
    asking = (config.chat_template_kwargs or {}) | {"add_generation_prompt": True}
    changed = config.model_copy(update={"chat_template_kwargs": asking})
    return choose_template(config, rules.spec), choose_template(changed, rules.spec)


def template_pairs(config: AxolotlConfig, rules: TokenRules, whole: bool) -> TemplatePairs:
    """Messages and answers through a chat template."""
    roles = config.roles or {name: [name] for name in ("user", "assistant", "system", "tool")}
    return TemplatePairs(
        *both_templates(config, rules),
        names={"role": "role", "content": "content"} | property_names(config),
        roles={alias: role for role, aliases in roles.items() for alias in aliases},
        field_messages=config.field_messages or "messages",
        field_chosen=config.field_chosen or "chosen",
        field_rejected=config.field_rejected or "rejected",
        whole=whole,
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
    "orpo.chat_template": lambda config, rules, _: StagedPairs(
        OrpoStages(*both_templates(config, rules))
    ),
    "bradley_terry.chat_template": lambda config, rules, _: StagedPairs(
        BradleyTerryStages(turn_reader(config, frozenset()), *both_templates(config, rules))
    ),
    **dict.fromkeys(("sharegpt", "sharegpt.load_role", "sharegpt.load_guanaco"), sharegpt),
    **dict.fromkeys(("sharegpt_simple", "sharegpt_simple.load_role"), sharegpt),
    **dict.fromkeys(("sharegpt_simple.load_guanaco", "sharegpt_jokes"), sharegpt),
    "messages": messages,
    "messages.chat": messages,
}
