"""The options of conversations: where turns lie, which template writes them, what is trained."""

from dataclasses import replace

from headrace.dataprep.axolotl.chat import ChatStrategy, TrainRules
from headrace.dataprep.axolotl.prompts import split_type
from headrace.dataprep.axolotl.strategy import TokenRules
from headrace.dataprep.axolotl.templates import (
    choose_template,
    message_properties,
    named_templates,
    template_text,
)
from headrace.dataprep.axolotl.turns import property_names, turn_reader
from headrace.dataprep.text.encoding import encode_texts
from headrace.dataprep.text.tokenizer import control_texts
from headrace.schemas.errors import ConfigError
from headrace.schemas.prepare.axolotl_config import AxolotlConfig

SHAREGPT_NAMES = {"load_role": ("role", "value"), "load_guanaco": ("role", "text")}


def chat(config: AxolotlConfig, rules: TokenRules, style: str | None) -> ChatStrategy:
    """Conversations through a chat template."""
    template = choose_template(config, rules.spec)
    text = template_text(config, rules.spec)[1]
    reader = turn_reader(config, message_properties(template, text))
    train = train_rules(config, rules, text, reader.roles)
    return ChatStrategy(reader, template, train)


def train_rules(
    config: AxolotlConfig, rules: TokenRules, template: str, roles: dict[str, str]
) -> TrainRules:
    """Return the rules that decide which tokens of a conversation are trained.

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
        control=control_texts(rules.spec),
    )


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


def conversation_template(name: str | None) -> str | None:
    """The template that is named like one of fastchat's conversations."""
    if name is None or name in named_templates():
        return name
    raise ConfigError(
        f'conversation = "{name}": its layout came from fastchat, which is gone; set '
        'chat_template, for example to "chatml"'
    )
