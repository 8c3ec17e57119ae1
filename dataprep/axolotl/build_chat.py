"""The options of conversations: where turns lie, which template writes them, what is trained; and
pictures in them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.dataprep.axolotl.chat import ChatStrategy, TrainRules
from headrace.dataprep.axolotl.prompts import split_type
from headrace.dataprep.axolotl.strategy import Built, Plan, Row, RowError, TokenRules, as_mask
from headrace.dataprep.axolotl.templates import (
    choose_template,
    message_properties,
    named_templates,
    template_text,
)
from headrace.dataprep.axolotl.turns import property_names, read_messages, turn_reader
from headrace.dataprep.formats.picture_template import Expansion
from headrace.dataprep.images.picture import Picture, PictureError
from headrace.dataprep.images.picture_places import PicturePlaces
from headrace.dataprep.images.references import MARKER, Reference, is_picture, row_references
from headrace.dataprep.text.chat_mask import span_tokens
from headrace.dataprep.text.encoding import encode_texts
from headrace.dataprep.text.sample import Sample
from headrace.dataprep.text.tokenizer import control_texts
from headrace.dataprep.text.tokens import Located
from headrace.schemas.errors import ConfigError
from headrace.schemas.prepare.axolotl_config import AxolotlConfig
from headrace.schemas.prepare.images_config import ImagesConfig

if TYPE_CHECKING:
    from headrace.dataprep.images.source import PictureSource

SHAREGPT_NAMES = {"load_role": ("role", "value"), "load_guanaco": ("role", "text")}


def chat(config: AxolotlConfig, rules: TokenRules, style: str | None) -> ChatStrategy:
    """Conversations through a chat template."""
    return chat_strategy(config, rules, None)


def pictured_chat(config: AxolotlConfig, rules: TokenRules, images: ImagesConfig) -> "PicturedChat":
    """Conversations with pictures.

    Raises:
        ConfigError: rows of another type.
    """
    if config.type != "chat_template" or config.rl is not None:
        raise ConfigError(
            f'type = "{config.type}" reads no pictures; set type = "chat_template" without rl, or '
            "prepare it without [images]"
        )
    from headrace.dataprep.images.source import PictureSource

    source = PictureSource(images)
    return PicturedChat(chat_strategy(config, rules, source.marker), source)


def chat_strategy(config: AxolotlConfig, rules: TokenRules, marker: str | None) -> ChatStrategy:
    """Conversations through a chat template, which writes a marker for each picture."""
    template = choose_template(config, rules.spec, marker)
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


@dataclass(frozen=True)
class PicturedChat:
    """Conversations with pictures: their texts are planned with a marker for each, and the tokens
    of what stands for it are taken for the marker's.
    """

    chat: ChatStrategy
    source: "PictureSource"
    located: bool = True

    def plan(self, row: Row) -> Plan:
        """The rendering with the texts of its pictures, of which none is trained."""
        try:
            changed, references = self.place(row)
            plan = self.chat.plan(changed)
            found = plan.texts[0].count(self.source.marker)
            if found != len(references):
                raise PictureError(
                    "placeholder in a text",
                    f"{found} times {self.source.marker} where there are {len(references)} "
                    "pictures",
                )
            made = self.source.prepare(references)
        except PictureError as error:
            raise RowError(error.reason, error.detail) from None
        expansion = Expansion(plan.texts[0], self.source.marker, made.texts)

        def build(found: list[Located]) -> Built:
            first = found[0]
            built = plan.build([expansion.before(first), *found[1:]])
            return built._replace(
                samples=[with_pictures(s, first, expansion, made.pictures) for s in built.samples]
            )

        texts = [expansion.text, *plan.texts[1:]]
        return Plan(texts, build, "\0".join([*texts, *made.digests]))

    def place(self, row: Row) -> tuple[Row, list[Reference]]:
        """A row with places for its pictures in the contents of messages, and these pictures."""
        reader = self.chat.reader
        name = reader.names["content"]
        places = PicturePlaces(row_references(row, None))
        messages = []
        for number, message in enumerate(read_messages(row, reader.field_messages)):
            changed = dict(message)
            if has_pictures(message.get(name)):
                parts = places.read(message[name], f"{reader.field_messages}[{number}]")
                if not all(isinstance(part, str) for part in parts):
                    raise RowError("content is not text", f"message {number} has other parts")
                changed[name] = "".join(map(str, parts))
            messages.append(changed)
        plain = [{"role": self.role(message), "content": message.get(name)} for message in messages]
        places.settle(plain)
        for message, settled in zip(messages, plain, strict=True):
            message[name] = settled["content"]
        return {**row, reader.field_messages: messages}, places.found

    def role(self, message: Mapping[str, Any]) -> object:
        """The template's name of a message's role."""
        role = message.get(self.chat.reader.names["role"])
        return self.chat.reader.roles.get(role, role) if isinstance(role, str) else role


def has_pictures(content: object) -> bool:
    """Return whether a content has pictures, or places of some."""
    parts = content if isinstance(content, list) else [content]
    return any(is_picture(part) or MARKER in str(part) for part in parts)


def with_pictures(
    sample: Sample, located: Located, expansion: Expansion, pictures: tuple[Picture, ...]
) -> Sample:
    """A sample with its pictures, whose tokens are not trained."""
    whole = np.ones(len(sample.ids), np.bool_)
    trained = whole if sample.trained is None else sample.trained.copy()
    for span in expansion.spans:
        trained[span_tokens(located, span)] = False
    return sample._replace(trained=as_mask(trained), pictures=pictures)
