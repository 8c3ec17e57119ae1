"""The tokens that end a turn: which of those after a content are the model's to write."""

from dataclasses import dataclass

import numpy as np

from headrace.dataprep.text.chat_mask import RenderedChat, Turn, span_tokens
from headrace.dataprep.text.rendering import Span
from headrace.dataprep.text.tokenizer import control_ids, stop_ids
from headrace.dataprep.text.tokens import Located, TokenizerSpec

MOST_TOKENS_TO_END = 3  # between a turn's content and a token that ends it outside of the turn


@dataclass(frozen=True)
class EndTokens:
    """Tokens that are no text, those of them at which generation stops, and BOS."""

    control: frozenset[int]
    stop: frozenset[int]
    bos: int | None

    def turn_tokens(
        self, chat: RenderedChat, index: int, turn: Turn, located: Located
    ) -> tuple[list[slice], bool]:
        """The tokens of a turn with what ends it, and whether anything does."""
        *inner, last = turn.parts
        first = [span_tokens(located, part) for part in inner]
        stop = self.closed(chat.text, last, located) if turn.whole else None
        body = span_tokens(located, (last[0], max(last[0], turn.body_end)))
        if stop is None:
            stop = self.following(chat, index, turn, located, body.stop)
        end = body.stop if stop is None else stop
        return [*first, slice(min(body.start, end), end)], stop is not None

    def content_end(self, text: str, turn: Turn, located: Located) -> int:
        """Return where the content of a turn ends, before the tokens that end the turn."""
        if not turn.whole:
            return turn.body_end
        tokens = span_tokens(located, (turn.parts[-1][0], turn.body_end))
        end = turn.body_end
        for token in range(tokens.stop - 1, tokens.start - 1, -1):
            if int(located.ids[token]) not in self.control:
                break
            end = int(located.starts[token])
        return end

    def closed(self, text: str, part: Span, located: Located) -> int | None:
        """Return the end of a turn that closes with special tokens, several perhaps: after the last
        at which generation stops, else after the last of all. White space may stand between."""
        tokens = span_tokens(located, part)
        run = []
        for token in range(tokens.stop - 1, tokens.start - 1, -1):
            if int(located.ids[token]) in self.control:
                run.append(token)
            elif text[located.starts[token] : located.ends[token]].strip():
                break
        stops = [token for token in run if int(located.ids[token]) in self.stop]
        others = [token for token in run if int(located.ids[token]) != self.bos]
        return next((token + 1 for token in stops or others), None)

    def following(
        self, chat: RenderedChat, index: int, turn: Turn, located: Located, start: int
    ) -> int | None:
        """Return the end of a turn that the template ends elsewhere: after the first special token
        before the next content, and those that follow if generation stops there."""
        limit = self.next_content(chat, index)
        last = min(start + MOST_TOKENS_TO_END, len(located.ids))
        for token in range(start, last):
            if located.starts[token] >= limit:
                return None
            if int(located.ids[token]) in self.control and int(located.ids[token]) != self.bos:
                return self.run_end(located, token, limit)
        return None

    def next_content(self, chat: RenderedChat, index: int) -> int:
        """The end of what the end of a turn may stand in."""
        for place in range(index + 1, len(chat.turns)):
            turn = chat.turns[place]
            if turn is not None:
                begin = chat.begins[place]
                return turn.start if begin is None else min(begin, turn.start)
        return len(chat.text)

    def run_end(self, located: Located, token: int, limit: int) -> int:
        """Return the end of a run of ending tokens that goes on to one which stops generation."""
        if int(located.ids[token]) in self.stop:
            return token + 1
        for place in range(token + 1, len(located.ids)):
            number = int(located.ids[place])
            if number not in self.control or located.starts[place] >= limit:
                break
            if number in self.stop:
                return place + 1
        return token + 1


def end_tokens(spec: TokenizerSpec) -> EndTokens:
    """The tokens of a tokenizer that may end a turn."""
    stop = stop_ids(spec)
    return EndTokens(control_ids(spec) | stop, stop, dict(spec.special_tokens).get("bos"))


def body_tokens(turn: Turn, located: Located, end: int) -> list[slice]:
    """The tokens of a turn up to a character."""
    parts = [(start, min(stop, end)) for start, stop in turn.parts[:-1]]
    return [span_tokens(located, part) for part in [*parts, (turn.parts[-1][0], end)]]


def as_mask(tokens: list[slice], length: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Slices of tokens as a mask of shape [length]."""
    mask = np.zeros(length, np.bool_)
    for part in tokens:
        mask[part] = True
    return mask
