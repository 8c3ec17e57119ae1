"""The loss mask of a conversation: the turns that are trained, and which of their tokens."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from headrace.dataprep.text.chat_mask import RenderedChat, Turn, span_tokens
from headrace.dataprep.text.conversation import Conversation
from headrace.dataprep.text.rendering import Span
from headrace.dataprep.text.sample import Mask
from headrace.dataprep.text.tokens import Located
from headrace.dataprep.text.turn_ends import EndTokens, body_tokens
from headrace.schemas.prepare.chat_config import ChatConfig

if TYPE_CHECKING:
    from headrace.dataprep.images.source import PreparedPictures

NO_END = "trained turns that end without a token that ends them"
NO_PLACE = "turns that were to be trained, but have no text of their own in the rendering"


class Chat(NamedTuple):
    """One rendered conversation, which of its turns are trained, and its pictures, with the
    characters that stand for each."""

    conversation: Conversation
    trained_turns: list[int]
    rendered: RenderedChat
    pictures: "PreparedPictures | None" = None
    picture_spans: Sequence[Span] = ()

    def content(self) -> str:
        """One text for equal conversations with equal pictures."""
        text = self.conversation.content()
        return text if self.pictures is None else "\0".join([text, *self.pictures.digests])


class TurnMask:
    """Choice of the trained tokens of conversations: turns by `train_on`, or by their own flag.

    Args:
        ends: tells which tokens end a turn, where the config names none.
    """

    def __init__(self, chat: ChatConfig, ends: EndTokens) -> None:
        self.chat = chat
        self.ends = ends

    def trained_turns(self, conversation: Conversation) -> list[int]:
        """The turns that are trained, by index."""
        return [
            index
            for index, (message, flag) in enumerate(
                zip(conversation.messages, conversation.flags, strict=True)
            )
            if (message["role"] in self.chat.train_on if flag is None else flag)
        ]

    def mask(self, chat: Chat, located: Located, notes: Counter[str]) -> Mask:
        """Return the loss mask: the generated spans of each turn, else all from where the model
        begins to write it to the tokens that end it. Pictures are not trained.

        Args:
            notes: counts what is not as it should be.
        """
        trained = self.mask_turns(chat, located, notes)
        for span in chat.picture_spans:
            trained[span_tokens(located, span)] = False
        return trained

    def mask_turns(self, chat: Chat, located: Located, notes: Counter[str]) -> Mask:
        """Return the loss mask, pictures in trained turns included."""
        trained = np.zeros(len(located.ids), np.bool_)
        for index in chat.trained_turns:
            turn = chat.rendered.turns[index]
            if turn is None:
                notes[NO_PLACE] += 1
                continue
            for part in self.turn_tokens(chat.rendered, index, turn, located, notes):
                trained[part] = True
        return trained

    def turn_tokens(
        self, chat: RenderedChat, index: int, turn: Turn, located: Located, notes: Counter[str]
    ) -> list[slice]:
        """The tokens of one turn that are trained."""
        begin = chat.begins[index]
        first = turn.start if begin is None else begin
        limit = chat.next_begin(index) if begin is not None else turn.body_end
        blocks = [block for block in chat.generated if block[1] > first and block[0] < limit]
        if blocks:
            return [span_tokens(located, block) for block in blocks]
        if self.chat.end_of_turn is None:
            tokens, ended = self.ends.turn_tokens(chat, index, turn, located)
        else:
            end = self.named_end(chat, index, turn)
            tokens = body_tokens(
                turn, located, end or self.ends.content_end(chat.text, turn, located)
            )
            ended = end is not None
        notes[NO_END] += not ended
        return tokens

    def named_end(self, chat: RenderedChat, index: int, turn: Turn) -> int | None:
        """Return where the text that ends a turn ends, if it is there."""
        assert self.chat.end_of_turn is not None
        limit = self.ends.next_content(chat, index)
        start, stop = turn.parts[-1]
        found = chat.text.rfind(self.chat.end_of_turn, start, stop) if turn.whole else -1
        if found < 0:
            found = chat.text.find(self.chat.end_of_turn, turn.body_end, limit)
        return None if found < 0 else found + len(self.chat.end_of_turn)
