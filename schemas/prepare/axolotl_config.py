"""The `[sources.axolotl]` table: how Axolotl would read the rows of a source."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from headrace.schemas.config_model import Config, Text
from headrace.schemas.shards.shard_kind import ShardKind

OF_TEXTS = ("completion", "pretrain")  # types without a prompt
Ends = Literal["turn", "all", "last", "none"]


class CustomType(Config):
    """A `type` that is a table: columns, and formats with `{instruction}`, `{input}`, `{system}`.

    For preference rows the formats hold `{system}`, `{prompt}`, `{chosen}` and `{rejected}`, or
    `{completion}` where `rl` is `kto`.
    """

    system_prompt: str | None = Field(None, description="System text of rows without the column.")
    system_format: str | None = Field(None, description='Default: `"{system}"`.')
    field_system: str | None = Field(None, description='Default: `"system"`.')
    field_instruction: str | None = Field(None, description='Default: `"instruction"`.')
    field_input: str | None = Field(None, description='Default: `"input"`.')
    field_output: str | None = Field(None, description='Default: `"output"`.')
    format: str | None = Field(None, description='Default: `"{instruction} {input} "`.')
    no_input_format: str | None = Field(None, description='Default: `"{instruction} "`.')
    field_prompt: str | None = Field(None, description='Default: `"prompt"`.')
    field_chosen: str | None = Field(None, description='Default: `"chosen"`.')
    field_rejected: str | None = Field(None, description='Default: `"rejected"`.')
    field_completion: str | None = Field(None, description='Default: `"completion"`.')
    field_label: str | None = Field(None, description='Default: `"label"`.')
    prompt_format: str | None = Field(None, description='Default: `"{prompt}"`.')
    chosen_format: str | None = Field(None, description='Default: `"{chosen}"`.')
    rejected_format: str | None = Field(None, description='Default: `"{rejected}"`.')
    completion_format: str | None = Field(None, description='Default: `"{completion}"`.')


def name_or_table(value: object) -> str:
    """Return the tag of the union's member that a `type` belongs to, so that errors name it."""
    return "<table>" if isinstance(value, dict | CustomType) else "<name>"


class AxolotlConfig(Config):
    """One entry of Axolotl's `datasets:`, with the top-level keys that change its tokens."""

    type: Annotated[
        Annotated[Text, Tag("<name>")] | Annotated[CustomType, Tag("<table>")],
        Discriminator(name_or_table),
    ] = Field(
        description='Axolotl\'s type, as `"alpaca"` or `"chat_template"`, or a table of formats.'
    )
    rl: Literal["dpo", "ipo", "simpo", "orpo", "kto"] | None = Field(
        None,
        description="Preference training: rows have a chosen and a rejected answer, of `kto` one "
        "answer and a label.",
    )
    train_on_inputs: bool = Field(False, description="Train prompts as well as answers.")
    min_sample_len: int = Field(2, ge=1, description="Samples of fewer tokens are dropped.")
    drop_untrained: bool = Field(
        False, description="Drop samples without a trained token, as `sample_packing` does."
    )
    raise_on_long: bool = Field(
        False, description="Stop at a sample of more than `sequence_len` tokens."
    )
    field: str | None = Field(None, description='Text column of `completion`. Default: `"text"`.')
    text_column: str | None = Field(None, description='Text column of `pretrain`: `"text"`.')
    conversation: str | None = Field(None, description="Style of `alpaca_chat` and `sharegpt`.")
    field_messages: str | None = Field(
        None,
        description='Column of the messages. Default: `"messages"`, of ShareGPT types '
        '`"conversations"`.',
    )
    field_tools: str | None = Field(None, description='Column of the tools: `"tools"`.')
    field_thinking: str | None = Field(
        None, description="Property of a message that holds reasoning."
    )
    field_chosen: str | None = Field(None, description='Default: `"chosen"`.')
    field_rejected: str | None = Field(None, description='Default: `"rejected"`.')
    template_thinking_key: str | None = Field(
        None, description='What the template calls reasoning. Default: `"reasoning_content"`.'
    )
    message_property_mappings: dict[str, str] | None = Field(
        None, description="Template's name of a message's property, and the rows' name of it."
    )
    message_field_role: str | None = Field(None, description="Older name of the mapping of `role`.")
    message_field_content: str | None = Field(
        None, description="Older name of the mapping of `content`."
    )
    message_field_training: str | None = Field(
        None, description="Property of a message that says whether it is trained."
    )
    message_field_training_detail: str | None = Field(
        None, description="Property that lists `begin_offset`, `end_offset` and `train`."
    )
    roles: dict[str, list[str]] | None = Field(
        None,
        description="Template's roles, each with the rows' names of it. Default: `user` "
        'is `["human", "user"]`, `assistant` `["gpt", "assistant"]`.',
    )
    roles_to_train: list[str] | None = Field(None, description='Default: `["assistant"]`.')
    train_on_eos: Ends | None = Field(
        None, description='EOS after which turns are trained. Default: `"turn"`, the trained ones.'
    )
    train_on_eot: Ends | None = Field(
        None, description="The same for `eot_tokens`. Default: `train_on_eos`."
    )
    eot_tokens: list[str] | None = Field(None, description="Tokens that end a turn. Default: EOS.")
    drop_system_message: bool | None = Field(None, description="Leave out a first system message.")
    split_thinking: bool | None = Field(
        None, description="Take reasoning between `<think>` and `</think>` out of the content."
    )
    chat_template: str | None = Field(
        None,
        description='`"tokenizer_default"` (default), `"tokenizer_default_fallback_NAME"`, '
        '`"jinja"`, or the name of a template that Axolotl brings.',
    )
    chat_template_jinja: str | None = Field(None, description="The template itself, or its file.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables for the template."
    )
    date: str | None = Field(
        None, description="The day, `YYYY-MM-DD`, for a template that asks for today's date."
    )
    default_system_message: str | None = Field(
        None, description="In place of the `chatml` template's own."
    )
    rows: str | None = Field(
        None,
        description='Take these rows of all files together, as `"[:1000]"` or `"[10%:]"`.',
    )
    row_ranges: dict[str, list[int]] | None = Field(
        None, description="The same for each file, from 0; worked out from `rows`."
    )
    options: dict[str, Any] = Field(
        {}, description='Further keys of the entry, for `engine = "axolotl"`.'
    )
    shards: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Cut the rows into so many equal shares, by their content."
    )
    shards_idx: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Take only this share, from 0. Default: all."
    )
    weight: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Take this share of the rows, chosen by content."
    )


def type_gives_answers(rl: object, kind: object) -> bool:
    """Return whether rows of a type are prompts and answers, which no row's end must part."""
    return kind_of_type(rl, kind) == "causal" and kind not in OF_TEXTS


def kind_of_type(rl: object, kind: object) -> ShardKind:
    """Return the kind of rows of a type: with one answer, two, or one with a label."""
    if rl == "kto":
        return "unpaired"
    pairs = rl is not None or kind in ("orpo.chat_template", "bradley_terry.chat_template")
    return "preference" if pairs else "causal"
