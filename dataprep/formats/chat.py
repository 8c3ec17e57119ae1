"""Conversations: rendered by a chat template, with the turns of some roles trained."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from headrace.dataprep.formats.marked_messages import check_marks, mark_conversation
from headrace.dataprep.formats.picture_template import expand_pictures, open_template
from headrace.dataprep.formats.turn_mask import Chat, TurnMask
from headrace.dataprep.images.picture import PictureError
from headrace.dataprep.images.references import FIELDS as PICTURE_FIELDS
from headrace.dataprep.input.records import Record, Reject
from headrace.dataprep.input.streams import line_of, refuse
from headrace.dataprep.text.chat_losses import UNWRITTEN, absent_role, text_losses
from headrace.dataprep.text.chat_mask import render_chat
from headrace.dataprep.text.chat_template import ChatTemplate
from headrace.dataprep.text.conversation import (
    FIELDS,
    Conversation,
    ConversationError,
    arguments_as_text,
    prints_tables,
    read_conversation,
    with_null_contents,
)
from headrace.dataprep.text.encoding import encode_chats
from headrace.dataprep.text.rendering import TemplateRefusedError
from headrace.dataprep.text.row_format import Encoded
from headrace.dataprep.text.sample import Sample
from headrace.dataprep.text.tokenizer import open_marked
from headrace.dataprep.text.tokens import Located, TokenizerSpec
from headrace.dataprep.text.turn_ends import end_tokens
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.chat_config import ChatConfig
from headrace.schemas.prepare.images_config import ImagesConfig

if TYPE_CHECKING:
    from headrace.dataprep.images.source import PictureSource

ResultT = TypeVar("ResultT")

UNTRAINED = "nothing in it is trained"


class ChatFormat:
    """Conversations in any of the usual shapes; only the wanted turns are trained."""

    def __init__(
        self, chat: ChatConfig, tokenizer: TokenizerSpec, images: ImagesConfig | None = None
    ) -> None:
        self.chat = chat
        self.tokenizer = tokenizer
        self.pictures = open_source(images)
        marker = None if self.pictures is None else self.pictures.marker
        self.templates = ChatTemplates(chat, tokenizer, marker)
        self.turns = TurnMask(chat, end_tokens(tokenizer))
        self.columns = frozenset([*([chat.field] if chat.field else FIELDS), "system", "tools"])
        self.columns |= {chat.prompt, chat.completion, *filter(None, [chat.prompt_input])}
        if self.pictures is not None:
            self.columns |= picture_fields(chat)

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Reject]:
        """One document for each conversation."""
        chats = [self.read(record) for record in records]
        good = [chat for chat in chats if isinstance(chat, Chat)]
        located = iter(self.tokenize([chat.rendered.text for chat in good]))
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
            pictured = self.pictures is not None
            read = read_conversation(record.fields, self.chat, pictured)
            conversation = self.keep_text(read)
            return self.render(conversation, self.turns.trained_turns(conversation))

        return attempt(record, rendered)

    def tokenize(self, texts: Sequence[str]) -> list[Located]:
        """The tokens of rendered conversations."""
        return encode_chats(self.tokenizer, texts, self.chat.split_special_tokens)

    def keep_text(self, conversation: Conversation) -> Conversation:
        """A conversation whose special tokens are marked as text, if the config wants that."""
        if not self.chat.split_special_tokens:
            return conversation
        return mark_conversation(conversation, open_marked(self.tokenizer).pattern)

    def render(self, conversation: Conversation, trained: list[int]) -> Chat:
        """A conversation as text, with its turns found.

        Raises:
            ConversationError: the text of a special token is written in another way.
        """
        chat = self.render_calls(conversation, trained)
        if conversation.marked:
            check_marks(chat.rendered.text)
        return chat if self.pictures is None else self.with_pictures(chat, self.pictures)

    def with_pictures(self, chat: Chat, source: "PictureSource") -> Chat:
        """A conversation with its pictures, and the text that stands for them.

        Raises:
            ConversationError: the rendering has other places than there are pictures.
            PictureError: one cannot be taken.
        """
        references = chat.conversation.pictures
        found = chat.rendered.text.count(source.marker)
        if found != len(references):
            raise ConversationError(
                "placeholder in a text",
                f"{found} times {source.marker} where there are {len(references)} pictures",
            )
        made = source.prepare(references)
        rendered, spans = expand_pictures(chat.rendered, source.marker, made.texts)
        return chat._replace(rendered=rendered, pictures=made, picture_spans=spans)

    def render_calls(self, conversation: Conversation, trained: list[int]) -> Chat:
        """The same with a content of None beside tool calls, as OpenAI's rows have it, where the
        template leaves out the calls of messages without any content, or refuses them."""
        chat = attempt_chat(lambda: self.render_arguments(conversation, trained))
        nulled = with_null_contents(conversation.messages)
        if nulled is None or (isinstance(chat, Chat) and not loses_calls(chat)):
            return taken(chat)
        other = attempt_chat(
            lambda: self.render_arguments(conversation._replace(messages=nulled), trained)
        )
        better = isinstance(other, Chat) and not (isinstance(chat, Chat) and loses_calls(other))
        return taken(other if better else chat)

    def render_arguments(self, conversation: Conversation, trained: list[int]) -> Chat:
        """The same with arguments of tool calls as tables, or as text where the template takes
        nothing else."""
        template = self.templates.choose(conversation)
        messages, tools = conversation.messages, conversation.tools
        try:
            rendered = render_chat(template, messages, tools, trained)
            if not prints_tables(messages, rendered.text):
                return Chat(conversation, trained, rendered)
        except TemplateRefusedError as error:
            if not error.mistyped or not any(m.get("tool_calls") for m in messages):
                raise
        written = arguments_as_text(messages)
        return Chat(conversation, trained, render_chat(template, written, tools, trained))

    def finish(self, chat: Chat, located: Located) -> Encoded:
        """The sample of one conversation, or none where no token is trained."""
        notes = text_losses(chat.conversation.messages, chat.rendered)
        roles = {message["role"] for message in chat.conversation.messages}
        absent, named = set(self.chat.train_on) - roles, self.chat.roles.values()
        notes.update(absent_role(role, named) for role in sorted(absent))
        trained = self.turns.mask(chat, located, notes)
        content, pictures = chat.content(), chat.pictures.pictures if chat.pictures else ()
        if not trained[1:].any():  # nothing predicts the first
            lost = {UNTRAINED: len(pictures)} if pictures else {}
            return Encoded(content, [], {UNTRAINED: len(trained)}, notes, lost)
        mask = None if trained.all() else trained
        sample = Sample(located.ids, mask, pictures=pictures)
        return Encoded(content, [sample], notes=notes)


def attempt_chat(render: Callable[[], Chat]) -> Chat | TemplateRefusedError:
    """Return a rendered conversation, or why the template refuses it."""
    try:
        return render()
    except TemplateRefusedError as error:
        return error


def taken(chat: Chat | TemplateRefusedError) -> Chat:
    """Return a rendered conversation.

    Raises:
        TemplateRefusedError: it was refused.
    """
    if isinstance(chat, TemplateRefusedError):
        raise chat
    return chat


def loses_calls(chat: Chat) -> bool:
    """Return whether a rendering lacks some tool calls."""
    losses = text_losses(chat.conversation.messages, chat.rendered)
    return losses[f"tool_calls {UNWRITTEN}"] > 0


def attempt(record: Record, read: Callable[[], ResultT]) -> ResultT | Reject:
    """Return what `read` makes of a record, or why the record is refused.

    Raises:
        DataError: a problem of all records, with the place of this one.
    """
    try:
        return read()
    except ConversationError as error:
        return refuse(record.place, error.reason, error.detail)
    except PictureError as error:
        return refuse(record.place, error.reason, error.detail)
    except TemplateRefusedError as error:
        return refuse(record.place, "refused by the chat template", str(error))
    except DataError as error:
        raise DataError(f"{record.place.file}:{line_of(record.place)}: {error}") from None


class ChatTemplates:
    """The templates of one source: the config's, or the tokenizer's own.

    Args:
        marker: what they write for a picture, where there may be some.

    Raises:
        DataError: there is none, or it is no template.
    """

    def __init__(
        self, chat: ChatConfig, tokenizer: TokenizerSpec, marker: str | None = None
    ) -> None:
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
            name: open_template(marker, label(folder, name), text, variables, chat.date)
            for name, text in texts.items()
            if name in ("default", "tool_use")
        }

    def choose(self, conversation: Conversation) -> ChatTemplate:
        """The template for a conversation: with tools, the one for tools if there is one."""
        default = self.by_name["default"]
        return self.by_name.get("tool_use", default) if conversation.tools else default


def open_source(images: ImagesConfig | None) -> "PictureSource | None":
    """Return what prepares pictures, if there may be some: only then Pillow is needed."""
    if images is None:
        return None
    from headrace.dataprep.images.source import PictureSource

    return PictureSource(images)


def picture_fields(chat: ChatConfig) -> frozenset[str]:
    """Return the fields of a row that may list its pictures."""
    return frozenset([chat.images] if chat.images else PICTURE_FIELDS)


def label(folder: str, name: str) -> str:
    """Return what messages call a template."""
    return folder if folder == "chat.template" else f'{folder}: chat template "{name}"'
