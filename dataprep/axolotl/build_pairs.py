"""The options of preference rows: where prompt and answers lie, and how they are written."""

from collections.abc import Callable, Mapping, Sequence

from headrace.dataprep.axolotl.preference import (
    CUSTOM_PAIR,
    LAYOUTS,
    CustomTexts,
    Pair,
    TextPairs,
    nectar,
    passthrough,
)
from headrace.dataprep.axolotl.preference_chat import (
    ArgillaPairs,
    BradleyTerryStages,
    OrpoStages,
    StagedPairs,
    TemplatePairs,
)
from headrace.dataprep.axolotl.prompts import check_format, unknown
from headrace.dataprep.axolotl.strategy import Row, TokenRules
from headrace.dataprep.axolotl.templates import choose_template
from headrace.dataprep.axolotl.turns import property_names, turn_reader
from headrace.dataprep.axolotl.unpaired import (
    ANSWER_LAYOUTS,
    CUSTOM_ANSWER,
    Answer,
    LabeledAnswers,
    plain_answer,
)
from headrace.dataprep.text.chat_template import ChatTemplate
from headrace.schemas.prepare.axolotl_config import AxolotlConfig, CustomType

TEMPLATED = ("chat_template.default", "chat_template.argilla_chat")
NAMES = (*LAYOUTS, *TEMPLATED, "zephyr.nectar", "passthrough")


def text_pairs(config: AxolotlConfig, rules: TokenRules) -> TextPairs:
    """Rows of `rl: dpo` and its like."""
    rules.need_eos()
    eos = dict(rules.spec.token_texts)["eos_token"]
    return TextPairs(rules, pair_reader(config, rules), eos)


def labeled_answers(config: AxolotlConfig, rules: TokenRules) -> LabeledAnswers:
    """Rows of `rl: kto`."""
    rules.need_eos()
    eos = dict(rules.spec.token_texts)["eos_token"]
    label = config.type.field_label if isinstance(config.type, CustomType) else None
    return LabeledAnswers(rules, answer_reader(config), eos, label or CUSTOM_ANSWER["field_label"])


def answer_reader(config: AxolotlConfig) -> Callable[[Row], Answer]:
    """Return a function that reads the prompt and the answer of a row with a label."""
    if isinstance(config.type, CustomType):
        options = custom_options(config.type, CUSTOM_ANSWER, Answer._fields)
        return CustomTexts(options, Answer._fields, Answer)
    if config.type == "passthrough":
        return plain_answer
    if config.type not in ANSWER_LAYOUTS:
        raise unknown("type for kto", config.type, [*ANSWER_LAYOUTS, "passthrough"])
    return ANSWER_LAYOUTS[config.type]


def custom_options(
    kind: CustomType, usual: Mapping[str, str], fields: Sequence[str]
) -> dict[str, str]:
    """Return the columns and formats of a `type:` that is a table of them.

    Raises:
        ConfigError: a format names what there is none of.
    """
    options = {**usual, **kind.model_dump(include=set(usual), exclude_none=True)}
    for name in fields:
        known = {"system", "prompt"} if name == "prompt" else {name}
        check_format(f"{name}_format", options[f"{name}_format"], known)
    return options


def orpo(config: AxolotlConfig, rules: TokenRules, style: str | None) -> StagedPairs:
    """`orpo.chat_template`."""
    return StagedPairs(OrpoStages(*both_templates(config, rules)))


def bradley_terry(config: AxolotlConfig, rules: TokenRules, style: str | None) -> StagedPairs:
    """`bradley_terry.chat_template`."""
    reader = turn_reader(config, frozenset())
    return StagedPairs(BradleyTerryStages(reader, *both_templates(config, rules)))


def pair_reader(config: AxolotlConfig, rules: TokenRules) -> Callable[[Row], Pair]:
    """Return a function that reads the chosen and the rejected answer of a row."""
    if isinstance(config.type, CustomType):
        options = custom_options(config.type, CUSTOM_PAIR, Pair._fields)
        return CustomTexts(options, Pair._fields, Pair)
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
        case name if name in TEMPLATED:
            return template_pairs(config, rules, whole=name.endswith("argilla_chat"))
    raise unknown(f"type for {config.rl}", name, NAMES)


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


def both_templates(config: AxolotlConfig, rules: TokenRules) -> tuple[ChatTemplate, ChatTemplate]:
    """The template of a source, and the same ending in the header of an answer."""
    asking = (config.chat_template_kwargs or {}) | {"add_generation_prompt": True}
    changed = config.model_copy(update={"chat_template_kwargs": asking})
    return choose_template(config, rules.spec), choose_template(changed, rules.spec)
