"""Answers that stand alone, each with a label: whether it is a desirable one."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from headrace.dataprep.formats.chat import UNTRAINED, attempt
from headrace.dataprep.formats.preference import PreferenceFormat
from headrace.dataprep.formats.turn_mask import Chat
from headrace.dataprep.input.records import Record, Reject, refuse
from headrace.dataprep.text.chat_losses import text_losses
from headrace.dataprep.text.conversation import (
    Conversation,
    ConversationError,
    parse_json,
    quoted,
    read_label,
)
from headrace.dataprep.text.encoding import encode_located
from headrace.dataprep.text.row_format import Encoded
from headrace.dataprep.text.sample import Sample
from headrace.dataprep.text.tokens import Located, TokenizerSpec
from headrace.schemas.fingerprint import canonical_json
from headrace.schemas.prepare.chat_config import PreferenceConfig, UnpairedConfig
from headrace.schemas.prepare.source_config import SourceConfig


class LabeledText(NamedTuple):
    """A prompt and an answer as text, and the answer's label."""

    prompt: str
    answer: str
    desirable: bool


class LabeledChat(NamedTuple):
    """A rendered conversation that ends in the answer, and the answer's label."""

    chat: Chat
    desirable: bool


class UnpairedFormat:
    """Each record is one answer with its prompt and its label; the answer is trained.

    It is read and rendered as a side of a pair is.
    """

    def __init__(self, source: SourceConfig, tokenizer: TokenizerSpec) -> None:
        self.names = source.unpaired or UnpairedConfig()
        sides = PreferenceConfig(
            prompt=self.names.prompt,
            chosen=self.names.completion,
            rejected=self.names.completion,
            as_chat=self.names.as_chat,
        )
        self.sides = PreferenceFormat(source.model_copy(update={"preference": sides}), tokenizer)
        self.tokenizer = tokenizer
        self.columns = self.sides.columns | {self.names.label}

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Reject]:
        """One answer for each record."""
        found = [self.read(record) for record in records]
        texts = [item.prompt + item.answer for item in found if isinstance(item, LabeledText)]
        chats = [item.chat.rendered.text for item in found if isinstance(item, LabeledChat)]
        parse = self.sides.ends.parse_special_tokens
        of_texts = iter(encode_located(self.tokenizer, texts, parse_special_tokens=parse))
        of_chats = iter(self.sides.chat_format().tokenize(chats) if chats else [])
        for record, item in zip(records, found, strict=True):
            if isinstance(item, LabeledText):
                located = next(of_texts)
                sample = self.sides.plain_side(item.prompt, located)
                yield finish(record, sample, item.desirable, canonical_json(item), Counter())
            elif isinstance(item, LabeledChat):
                yield self.finish_chat(record, item, next(of_chats))
            else:
                yield item

    def read(self, record: Record) -> LabeledText | LabeledChat | Reject:
        """The answer of a record."""
        return attempt(record, lambda: self.read_answer(record.fields))

    def read_answer(self, fields: dict[str, Any]) -> LabeledText | LabeledChat:
        """The answer of a record, as text or rendered.

        Raises:
            ConversationError: there is none, or no label.
        """
        answer = parse_json(fields.get(self.names.completion))
        if answer is None:
            raise ConversationError("missing field", f"no field {quoted(self.names.completion)}")
        desirable = read_label(fields, self.names.label)
        prompt = self.sides.read_prompt(fields)
        if isinstance(prompt, str) and isinstance(answer, str) and not self.names.as_chat:
            space = " " if self.sides.space and not f"{prompt}{answer}".startswith(" ") else ""
            return LabeledText(f"{space}{prompt}", answer, desirable)
        conversation = self.sides.read_side(fields, prompt, answer)
        return LabeledChat(self.sides.render(conversation, after_user(conversation)), desirable)

    def finish_chat(self, record: Record, item: LabeledChat, located: Located) -> Encoded | Reject:
        """The sample of a conversation."""
        chat = item.chat
        notes: Counter[str] = Counter()
        notes += text_losses(chat.conversation.messages, chat.rendered)
        mask = self.sides.chat_format().turns.mask(chat, located, notes)
        content = canonical_json([chat.conversation.content(), item.desirable])
        return finish(record, Sample(located.ids, mask), item.desirable, content, notes)


def finish(
    record: Record, sample: Sample, desirable: bool, content: str, notes: Counter[str]
) -> Encoded | Reject:
    """The document of an answer; none where no token of it is trained."""
    if not len(sample.ids):
        return refuse(record.place, "empty document", "the tokenizer gives no token")
    if not sample.is_trained:
        return Encoded(content, [], {UNTRAINED: sample.tokens}, notes)
    return Encoded(content, [sample._replace(desirable=desirable)], notes=notes)


def after_user(conversation: Conversation) -> int:
    """Return the number of turns up to the last of the user, which the answer follows."""
    roles = [message["role"] for message in conversation.messages]
    return max((index + 1 for index, role in enumerate(roles) if role == "user"), default=0)
