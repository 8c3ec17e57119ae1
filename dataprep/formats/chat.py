"""Conversations: rendered by a chat template, with the turns of some roles trained."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from headrace.dataprep.chat_mask import RenderedChat, render_chat, span_tokens
from headrace.dataprep.chat_template import ChatTemplate, Span, TemplateRefusedError
from headrace.dataprep.conversation import (
    FIELDS,
    Conversation,
    ConversationError,
    read_conversation,
)
from headrace.dataprep.formats.sample import Encoded, Mask, Sample
from headrace.dataprep.records import Record, Reject, refuse
from headrace.dataprep.tokenizer import Located, TokenizerSpec, control_ids, encode_located
from headrace.schemas.chat_config import ChatConfig
from headrace.schemas.errors import DataError

ResultT = TypeVar("ResultT")

UNTRAINED = "nothing in it is trained"
MOST_TOKENS_TO_END = 3  # between a turn's content and the token that ends it


class Chat(NamedTuple):
    """One rendered conversation, and which of its turns are trained."""

    conversation: Conversation
    trained_turns: list[int]
    rendered: RenderedChat


class ChatFormat:
    """Conversations in any of the usual shapes; only the wanted turns are trained."""

    def __init__(self, chat: ChatConfig, tokenizer: TokenizerSpec) -> None:
        self.chat = chat
        self.tokenizer = tokenizer
        self.templates = ChatTemplates(chat, tokenizer)
        self.ends = control_ids(tokenizer)
        self.columns = frozenset([*([chat.field] if chat.field else FIELDS), "system", "tools"])

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Reject]:
        """One document for each conversation."""
        chats = [self.read(record) for record in records]
        good = [chat for chat in chats if isinstance(chat, Chat)]
        located = iter(encode_located(self.tokenizer, [chat.rendered.text for chat in good]))
        for record, chat in zip(records, chats, strict=True):
            if isinstance(chat, Reject):
                yield chat
                continue
            tokens = next(located)
            if not len(tokens.ids):
                yield refuse(record.place, "empty document", "the tokenizer gives no token")
                continue
            yield self.finish(chat, tokens)

    def read(self, record: Record) -> Chat | Reject:
        """The conversation of a record as text."""

        def rendered() -> Chat:
            conversation = read_conversation(record.fields, self.chat)
            return self.render(conversation, self.trained_turns(conversation))

        return attempt(record, rendered)

    def render(self, conversation: Conversation, trained: list[int]) -> Chat:
        """A conversation as text, with its turns found."""
        template = self.templates.choose(conversation)
        rendered = render_chat(template, conversation.messages, conversation.tools, trained)
        return Chat(conversation, trained, rendered)

    def trained_turns(self, conversation: Conversation) -> list[int]:
        """The turns that are trained, by index."""
        return [
            index
            for index, (message, flag) in enumerate(
                zip(conversation.messages, conversation.flags, strict=True)
            )
            if (message["role"] in self.chat.train_on if flag is None else flag)
        ]

    def finish(self, chat: Chat, located: Located) -> Encoded:
        """The sample of one conversation, or none where no token is trained."""
        trained = self.mask(chat, located)
        content = chat.conversation.content()
        if not trained.any():
            return Encoded(content, [], {UNTRAINED: len(trained)})
        return Encoded(content, [Sample(located.ids, None if trained.all() else trained)])

    def mask(self, chat: Chat, located: Located) -> Mask:
        """Return the loss mask: the template's generated spans, else each turn's content up to the
        token that ends it.
        """
        trained = np.zeros(len(located.ids), np.bool_)
        for index in chat.trained_turns:
            span = chat.rendered.turns[index]
            if span is None:
                continue
            blocks = [s for s in chat.rendered.generated if s[0] < span[1] and span[0] < s[1]]
            for block in blocks:
                trained[span_tokens(located, block)] = True
            if not blocks:
                trained[self.turn_tokens(chat, index, span, located)] = True
        return trained

    def turn_tokens(self, chat: Chat, index: int, span: Span, located: Located) -> slice:
        """The tokens of a turn's content, and of what ends the turn."""
        content = span_tokens(located, span)
        following = (turn[0] for turn in chat.rendered.turns[index + 1 :] if turn is not None)
        limit = next(following, len(chat.rendered.text))
        if self.chat.end_of_turn is not None:
            found = chat.rendered.text.find(self.chat.end_of_turn, span[1], limit)
            end = found + len(self.chat.end_of_turn)
            return content if found < 0 else span_tokens(located, (span[0], end))
        last = min(content.stop + MOST_TOKENS_TO_END, len(located.ids))
        for token in range(content.stop, last):
            if int(located.ids[token]) in self.ends and located.starts[token] < limit:
                return slice(content.start, token + 1)
        return content


def attempt(record: Record, read: Callable[[], ResultT]) -> ResultT | Reject:
    """Return the result of `read` for a record, or the reason why the record is refused.

    Raises:
        DataError: a problem of all records, with the place of this one.
    """
    try:
        return read()
    except ConversationError as error:
        return refuse(record.place, error.reason, error.detail)
    except TemplateRefusedError as error:
        return refuse(record.place, "refused by the chat template", str(error))
    except DataError as error:
        raise DataError(f"{record.place.file}:{record.place.number()}: {error}") from None


class ChatTemplates:
    """The templates of one source: the config's, or the tokenizer's own.

    Raises:
        DataError: there is none, or it is no template.
    """

    def __init__(self, chat: ChatConfig, tokenizer: TokenizerSpec) -> None:
        texts = dict(tokenizer.chat_templates)
        folder = str(tokenizer.folder)
        if chat.template is not None:
            named = chat.template in texts
            texts = {"default": texts[chat.template] if named else chat.template}
            folder = "chat.template" if not named else folder
        if "default" not in texts:
            names = ", ".join(sorted(texts))
            has = f"only templates named {names}" if names else "no chat template"
            raise DataError(f"{tokenizer.folder}: {has}; set template in [sources.chat]")
        variables = dict(tokenizer.token_texts) | chat.template_arguments
        self.by_name = {
            name: ChatTemplate(label(folder, name), text, variables, chat.date)
            for name, text in texts.items()
            if name in ("default", "tool_use")
        }

    def choose(self, conversation: Conversation) -> ChatTemplate:
        """The template for a conversation: with tools, the one for tools if there is one."""
        default = self.by_name["default"]
        return self.by_name.get("tool_use", default) if conversation.tools else default


def label(folder: str, name: str) -> str:
    """Return the name of a template for messages."""
    return folder if folder == "chat.template" else f'{folder}: chat template "{name}"'
