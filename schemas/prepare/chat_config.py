"""Options of conversations and of pairs: `[sources.chat]` and `[sources.preference]`."""

from typing import Any

from pydantic import Field

from headrace.schemas.config_model import Config, Text


class ChatConfig(Config):
    """Options that decide how conversations are rendered as text and which turns are trained."""

    field: Text | None = Field(
        None,
        description="Field with the list of messages. Default: `messages`, `conversations` or "
        "`conversation`, whichever a row has.",
    )
    images: Text | None = Field(
        None,
        description="Field that lists a row's pictures, where [images] is set. Default: `images` "
        "or `image`.",
    )
    prompt: Text = Field(
        "prompt",
        description="Field with a question, a text or messages, in rows that have no list of "
        "messages.",
    )
    prompt_input: Text | None = Field(
        None,
        description="Field whose text follows the question's on a line of its own where a row has "
        'one, as `"input"` of alpaca rows.',
    )
    completion: Text = Field(
        "completion", description="Field with the answer to it, which becomes the last turn."
    )
    template: Text | None = Field(
        None,
        description="Chat template: Jinja text, a file of it, or the name of one of the "
        "tokenizer's templates. Default: the tokenizer's own.",
    )
    template_arguments: dict[str, Any] = Field(
        {},
        description="Further variables of the template, as in `{enable_thinking = false}`.",
    )
    date: Text | None = Field(
        None,
        description="The day, `YYYY-MM-DD`, on which a template that asks for today's date is "
        "rendered, so that the same config gives the same tokens.",
    )
    roles: dict[str, str] = Field(
        {}, description='Further names of roles, for example `{prompter = "user"}`.'
    )
    train_on: list[Text] = Field(
        ["assistant"],
        description="Roles whose turns are trained. A message's own `train` (true, false) or "
        "`weight` (0, 1) goes before.",
    )
    end_of_turn: Text | None = Field(
        None,
        description="Text that ends a turn and is trained with it. Default: the special token "
        "that the template writes after the content.",
    )
    split_special_tokens: bool = Field(
        False,
        description="Keep special tokens that stand in messages, as `<|im_end|>`, as text; those "
        "of the template stay tokens.",
    )


class PreferenceConfig(Config):
    """Names of the fields that hold the prompt and the two answers of a pair."""

    prompt: Text = Field(
        "prompt", description="Field with what both answers follow: a text or messages."
    )
    chosen: Text = Field("chosen", description="Field with the better answer.")
    rejected: Text = Field("rejected", description="Field with the worse answer.")
    as_chat: bool = Field(
        False,
        description="Take rows of plain strings for a user's turn and its answer, rendered by the "
        "chat template. Otherwise prompt and answer are one text.",
    )


class UnpairedConfig(Config):
    """Names of the fields that hold a prompt, an answer to it, and whether that is a good one."""

    prompt: Text = Field("prompt", description="Field with the prompt: a text or messages.")
    completion: Text = Field("completion", description="Field with the answer.")
    label: Text = Field(
        "label", description="Field that is true where the answer is desirable, else false."
    )
    as_chat: bool = Field(
        False,
        description="Take rows of plain strings for a user's turn and its answer, rendered by the "
        "chat template. Otherwise prompt and answer are one text.",
    )
