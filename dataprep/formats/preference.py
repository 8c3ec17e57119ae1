"""Pairs of a better and a worse answer, and answers with labels: as conversations or as texts."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from headrace.dataprep.formats.chat import UNTRAINED, ChatFormat, attempt, picture_fields
from headrace.dataprep.formats.document_ends import document_ends, surround
from headrace.dataprep.formats.turn_mask import Chat
from headrace.dataprep.images.picture_places import PicturePlaces
from headrace.dataprep.images.references import Reference, row_references
from headrace.dataprep.input.records import Record, Reject
from headrace.dataprep.input.streams import refuse
from headrace.dataprep.text.chat_losses import text_losses
from headrace.dataprep.text.chat_mask import span_tokens
from headrace.dataprep.text.conversation import (
    FIELDS,
    Conversation,
    ConversationError,
    checked,
    parse_json,
    quoted,
    read_label,
    read_messages,
    read_tools,
)
from headrace.dataprep.text.encoding import encode_located
from headrace.dataprep.text.rendering import Message
from headrace.dataprep.text.row_format import Encoded
from headrace.dataprep.text.sample import Sample, pair
from headrace.dataprep.text.tokens import Located, TokenizerSpec
from headrace.schemas.fingerprint import canonical_json
from headrace.schemas.outside_text import json_type
from headrace.schemas.prepare.chat_config import ChatConfig, PreferenceConfig, UnpairedConfig
from headrace.schemas.prepare.images_config import ImagesConfig
from headrace.schemas.prepare.source_config import SourceConfig


class PlainPair(NamedTuple):
    """A prompt and two answers as text."""

    prompt: str
    chosen: str
    rejected: str

    def sides(self) -> tuple[str, str]:
        """The texts of both sides."""
        return self.prompt + self.chosen, self.prompt + self.rejected


class ChatPair(NamedTuple):
    """Two rendered conversations."""

    chosen: Chat
    rejected: Chat


class PreferenceFormat:
    """Each record is one pair; the answers are trained, what both follow is not."""

    def __init__(
        self, source: SourceConfig, tokenizer: TokenizerSpec, images: ImagesConfig | None = None
    ) -> None:
        self.images = images
        self.fields = source.preference or PreferenceConfig()
        self.chat = source.chat or ChatConfig()
        self.tokenizer = tokenizer
        self.ends = document_ends(source, tokenizer)
        self.space = source.add_prefix_space
        self.format: ChatFormat | None = None
        names = (self.fields.prompt, self.fields.chosen, self.fields.rejected)
        history = [self.chat.field] if self.chat.field else FIELDS
        self.columns = frozenset([*names, *history, "system", "tools"])
        if images is not None:
            self.columns |= picture_fields(self.chat)
        if source.chat is not None or self.fields.as_chat:
            self.chat_format()  # without a template it says so at once

    def chat_format(self) -> ChatFormat:
        """Return the format that renders conversations; rows of plain text need none."""
        self.format = self.format or ChatFormat(self.chat, self.tokenizer, self.images)
        return self.format

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Reject]:
        """One pair for each record."""
        pairs = [self.read(record) for record in records]
        located = iter(
            self.encode_pairs([found for found in pairs if not isinstance(found, Reject)])
        )
        for record, found in zip(records, pairs, strict=True):
            yield found if isinstance(found, Reject) else self.finish(record, found, *next(located))

    def encode_pairs(self, pairs: list[PlainPair | ChatPair]) -> Iterator[tuple[Located, Located]]:
        """The tokens of both sides of each pair; all texts of a kind in one call."""
        plain = [text for p in pairs if isinstance(p, PlainPair) for text in p.sides()]
        chats = [c.rendered.text for p in pairs if isinstance(p, ChatPair) for c in p]
        parse = self.ends.parse_special_tokens
        of_plain = iter(encode_located(self.tokenizer, plain, parse_special_tokens=parse))
        of_chats = iter(self.chat_format().tokenize(chats) if chats else [])
        for found in pairs:
            source = of_plain if isinstance(found, PlainPair) else of_chats
            yield next(source), next(source)

    def read(self, record: Record) -> PlainPair | ChatPair | Reject:
        """The pair of a record."""
        return attempt(record, lambda: self.read_pair(record.fields))

    def read_pair(self, fields: dict[str, Any]) -> PlainPair | ChatPair:
        """The pair of a record, as text or rendered.

        Raises:
            ConversationError: there is none.
        """
        answers = [parse_json(fields.get(n)) for n in (self.fields.chosen, self.fields.rejected)]
        for name, answer in zip((self.fields.chosen, self.fields.rejected), answers, strict=True):
            if answer is None:
                raise ConversationError("missing field", f"no field {quoted(name)}")
        if answers[0] == answers[1]:
            raise ConversationError("equal answers", "chosen and rejected are the same")
        prompt = self.read_prompt(fields)
        texts = [prompt, *answers]
        listed = self.listed_pictures(fields)
        if not listed and not self.fields.as_chat and all(isinstance(text, str) for text in texts):
            space = " " if self.space and not f"{prompt}{answers[0]}".startswith(" ") else ""
            return PlainPair(f"{space}{prompt}", *map(str, answers))
        chosen, rejected = (self.read_side(fields, prompt, answer, listed) for answer in answers)
        if chosen.pictures != rejected.pictures:
            raise ConversationError("answers with other pictures", "both sides share the pictures")
        start = common_turns(chosen, rejected)
        return ChatPair(self.render(chosen, start), self.render(rejected, start))

    def listed_pictures(self, fields: dict[str, Any]) -> Sequence[Reference]:
        """Return the pictures that a record lists beside its texts."""
        return row_references(fields, self.chat.images) if self.images is not None else []

    def read_prompt(self, fields: dict[str, Any]) -> object:
        """Return the prompt of both answers: a text or messages; None where the answers hold it."""
        names = [self.fields.prompt, *([self.chat.field] if self.chat.field else FIELDS)]
        return next((parse_json(fields[n]) for n in names if fields.get(n) is not None), None)

    def read_side(
        self,
        fields: dict[str, Any],
        prompt: object,
        answer: object,
        listed: Sequence[Reference] = (),
    ) -> Conversation:
        """One conversation: the prompt and an answer, or the answer if it holds all.

        Args:
            listed: pictures of the row.
        """
        roles, answer = self.chat.roles, as_messages(answer, "assistant")
        places = None if self.images is None else PicturePlaces(listed)
        before: tuple[list[Message], list[bool | None]] = ([], [])
        if first_role(answer, roles) == "assistant":
            if prompt is None:
                raise ConversationError("missing field", f"no field {quoted(self.fields.prompt)}")
            before = read_messages(as_messages(prompt, "user"), roles, "prompt", places)
        messages, flags = read_messages(answer, roles, "answer", places)
        messages, flags = [*before[0], *messages], [*before[1], *flags]
        if places is not None:
            places.settle(messages)
        system = fields.get("system")
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages, flags = [{"role": "system", "content": system}, *messages], [None, *flags]
        found = () if places is None else tuple(places.found)
        tools = read_tools(fields.get("tools"))
        return checked(Conversation(messages, flags, tools, pictures=found))

    def render(self, conversation: Conversation, start: int) -> Chat:
        """A side as text; turns that both sides have are not trained."""
        chats = self.chat_format()
        trained = [turn for turn in chats.turns.trained_turns(conversation) if turn >= start]
        return chats.render(chats.keep_text(conversation), trained)

    def finish(
        self, record: Record, found: PlainPair | ChatPair, chosen: Located, rejected: Located
    ) -> Encoded | Reject:
        """The sample of a pair."""
        notes: Counter[str] = Counter()
        if isinstance(found, PlainPair):
            content = canonical_json(found)
            sides = [self.plain_side(found.prompt, located) for located in (chosen, rejected)]
        else:
            content = canonical_json([side.content() for side in found])
            for side in found:
                notes += text_losses(side.conversation.messages, side.rendered)
            masks = [
                self.chat_format().turns.mask(c, t, notes)
                for c, t in zip(found, (chosen, rejected), strict=True)
            ]
            made = found.chosen.pictures
            pictures = () if made is None else made.pictures
            sides = [
                Sample(t.ids, m, pictures=pictures)
                for t, m in zip((chosen, rejected), masks, strict=True)
            ]
        if not all(len(side.ids) for side in sides):
            return refuse(record.place, "empty document", "the tokenizer gives no token")
        tokens = sum(side.tokens for side in sides)
        sample = pair(*sides)
        if not sample.is_trained:
            lost = {UNTRAINED: len(sample.pictures)} if sample.pictures else {}
            return Encoded(content, [], {UNTRAINED: tokens}, notes, lost)
        return Encoded(content, [sample], notes=notes)

    def plain_side(self, prompt: str, located: Located) -> Sample:
        """The tokens of a prompt and an answer between their ends; before the answer, none is
        trained."""
        ids = surround(self.ends, located.ids)
        trained = np.ones(len(ids), np.bool_)
        if len(ids):
            bos = self.ends.bos is not None and located.ids[0] != self.ends.bos
            first = span_tokens(located, (len(prompt), len(prompt))).start
            trained[: len(self.ends.prefix) + bos + first] = False
        return Sample(ids, trained)


def first_role(answer: object, roles: Mapping[str, str]) -> object:
    """Return the role of the first message of an answer, whose pictures are not looked at."""
    found, _ = read_messages(answer, roles, "answer", Ignored(()))
    return found[0]["role"]


class Ignored(PicturePlaces):
    """Places whose pictures are not taken."""

    def next(self) -> None:
        """Take none."""


def as_messages(value: object, role: str) -> object:
    """A text as one message of a role, one message as a list; anything else as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if value is not None and not isinstance(value, dict | list):
        raise ConversationError("not a conversation", f"it is {json_type(value)}")
    return [value] if isinstance(value, dict) else value


def common_turns(chosen: Conversation, rejected: Conversation) -> int:
    """Return the number of turns that both sides begin with."""
    turns = zip(chosen.messages, rejected.messages, strict=False)
    return next(
        (index for index, (left, right) in enumerate(turns) if left != right),
        min(len(chosen.messages), len(rejected.messages)),
    )


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

    def __init__(
        self, source: SourceConfig, tokenizer: TokenizerSpec, images: ImagesConfig | None = None
    ) -> None:
        self.names = source.unpaired or UnpairedConfig()
        sides = PreferenceConfig(
            prompt=self.names.prompt,
            chosen=self.names.completion,
            rejected=self.names.completion,
            as_chat=self.names.as_chat,
        )
        source = source.model_copy(update={"preference": sides})
        self.sides = PreferenceFormat(source, tokenizer, images)
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
        prompt, listed = self.sides.read_prompt(fields), self.sides.listed_pictures(fields)
        plain = not listed and not self.names.as_chat
        if plain and isinstance(prompt, str) and isinstance(answer, str):
            space = " " if self.sides.space and not f"{prompt}{answer}".startswith(" ") else ""
            return LabeledText(f"{space}{prompt}", answer, desirable)
        conversation = self.sides.read_side(fields, prompt, answer, listed)
        return LabeledChat(self.sides.render(conversation, after_user(conversation)), desirable)

    def finish_chat(self, record: Record, item: LabeledChat, located: Located) -> Encoded | Reject:
        """The sample of a conversation."""
        chat = item.chat
        notes: Counter[str] = Counter()
        notes += text_losses(chat.conversation.messages, chat.rendered)
        mask = self.sides.chat_format().turns.mask(chat, located, notes)
        content = canonical_json([chat.content(), item.desirable])
        pictures = () if chat.pictures is None else chat.pictures.pictures
        sample = Sample(located.ids, mask, pictures=pictures)
        return finish(record, sample, item.desirable, content, notes)


def finish(
    record: Record, sample: Sample, desirable: bool, content: str, notes: Counter[str]
) -> Encoded | Reject:
    """The document of an answer; none where no token of it is trained."""
    if not len(sample.ids):
        return refuse(record.place, "empty document", "the tokenizer gives no token")
    if not sample.is_trained:
        lost = {UNTRAINED: len(sample.pictures)} if sample.pictures else {}
        return Encoded(content, [], {UNTRAINED: sample.tokens}, notes, lost)
    return Encoded(content, [sample._replace(desirable=desirable)], notes=notes)


def after_user(conversation: Conversation) -> int:
    """Return the number of turns up to the last of the user, which the answer follows."""
    roles = [message["role"] for message in conversation.messages]
    return max((index + 1 for index, role in enumerate(roles) if role == "user"), default=0)
