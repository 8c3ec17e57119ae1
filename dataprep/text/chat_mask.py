"""Spans of the turns in a rendered conversation, and the tokens they cover.

One rendering tells which text was written for which message. Where in it the model begins to write
is where the generation prompt ends: the conversation before the turn is rendered with it, once
for each kind of message that a turn follows. Where a template has no generation prompt, a turn
begins where its text differs from that of a message with another content. So the number of
renderings does not grow with the conversation.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from headrace.dataprep.text.rendering import (
    REASONING,
    Message,
    Rendering,
    Span,
    Template,
    TemplateRefusedError,
)
from headrace.dataprep.text.tokens import Located

MOST_PROBES = 12  # renderings that look for generation prompts, in one conversation
OTHERS = frozenset(["system", "developer", "user", "tool", "ipython", "function", "observation"])


class Turn(NamedTuple):
    """The characters that the model writes in one turn.

    `parts` go from where it begins to the end of the turn; `body_end` is where the content ends.
    `whole` is false where the end of the turn is not known, but only that of the content.
    """

    parts: list[Span]
    body_end: int
    whole: bool = True

    @property
    def start(self) -> int:
        """Return where the model begins to write."""
        return self.parts[0][0]


class RenderedChat(NamedTuple):
    """A conversation as text, its turns (None for one that has no place in it, or was not looked
    for), where the text of each message begins, and what the template marks with
    `{% generation %}`."""

    text: str
    turns: list[Turn | None]
    begins: list[int | None]
    generated: list[Span]

    def next_begin(self, index: int) -> int:
        """Return where the text of the next message that has one begins."""
        for place in range(index + 1, len(self.begins)):
            begin = self.begins[place]
            if begin is not None:
                return begin
        return len(self.text)


def render_chat(
    template: Template,
    messages: Sequence[Message],
    tools: list[Any] | None = None,
    wanted: Collection[int] | None = None,
) -> RenderedChat:
    """Render a conversation and find its turns.

    Args:
        wanted: the turns to find, by index; the others come as None. Default: all.

    Raises:
        TemplateRefusedError: the template does not take these messages.
        DataError: the template takes too long, or does what it must not.
    """
    rendering = template.render(messages, tools)
    indices = range(len(messages)) if wanted is None else sorted(wanted)
    finder = TurnFinder(template, messages, tools, rendering, indices)
    turns: list[Turn | None] = [None] * len(messages)
    for index in sorted(indices, key=lambda number: number == 0):  # the first follows nothing
        turns[index] = finder.find(index)
    begins = [spans[0][0] if spans else None for spans in rendering.turns]
    return RenderedChat(rendering.text, turns, begins, rendering.generated)


class TurnFinder:
    """Finds the turns of one conversation; renders what it needs for that, and no more."""

    def __init__(
        self,
        template: Template,
        messages: Sequence[Message],
        tools: list[Any] | None,
        rendering: Rendering,
        wanted: Sequence[int],
    ) -> None:
        self.template = template
        self.messages = messages
        self.tools = tools
        self.rendering = rendering
        self.wanted = wanted
        self.prompts: dict[object, str | None] = {}  # by what a turn follows
        self.settled: set[object] = set()  # those prompts that some turn was seen to follow
        self.openings: dict[object, str | None] = {}  # of turns with nothing but a content
        self.probes = 0
        self.differing: dict[int, Span] | None = None
        self.replaced: Callable[[Message, int], Message] = mark_turn  # what they differ from

    def find(self, index: int) -> Turn | None:
        """One turn, or None where the template does not write it."""
        spans = self.rendering.turns[index]
        if not spans:
            span = self.locate(index)
            return None if span is None else Turn([span], span[1], whole=False)
        start = self.generation_start(index)
        if start is None:
            start = self.content_start(index)
        parts = [(max(start, begin), end) for begin, end in spans if end > start]
        parts = parts or [(spans[-1][1], spans[-1][1])]
        if start < spans[0][0]:
            parts[0] = (start, parts[0][1])
        return Turn(parts, self.body_end(index, parts[-1]))

    def body_end(self, index: int, part: Span) -> int:
        """Return where the last text of a turn ends, less white space that no content has."""
        text = self.rendering.text[slice(*part)]
        bare = text.rstrip()
        content = self.messages[index].get("content")
        if isinstance(content, str):
            stem = content.rstrip()
            ends = bare.endswith(stem) if stem else not bare
            tail = content[len(stem) :]
            if ends and text[len(bare) :].startswith(tail):
                return part[0] + len(bare) + len(tail)
        return part[0] + len(bare)

    def generation_start(self, index: int) -> int | None:
        """Return where the generation prompt of a turn ends, or None where there is none."""
        if self.messages[index].get("role") in OTHERS:
            return None
        key = self.key(index)
        if key not in self.settled:
            if not index:
                self.probe_first(key)
            elif (start := self.probe(index, key)) is not None:
                return start
        own = self.prompts[key]
        begin, end = self.extent(index)
        for prompt in [own, *self.longest_prompts()] if own else self.longest_prompts():
            found = begin if index else max(begin, self.rendering.text.find(prompt, begin, end))
            if self.rendering.text.startswith(prompt, found, end):
                return found + len(prompt)
        if own == "":
            return begin
        start = None if own is None else self.shared_start(index, own)
        if start is not None:
            self.settled.add(key)
        return start

    def shared_start(self, index: int, prompt: str) -> int | None:
        """Return where a turn leaves a generation prompt that it does not follow to its end, before
        a token in angles or brackets that differs."""
        begin, end = self.extent(index)
        shared = prompt[: common_prefix(prompt, self.rendering.text[begin:end])]
        opened = max(map(shared.rfind, "<["))
        if opened > max(map(shared.rfind, ">]")):
            shared = shared[:opened]
        return min(begin + len(shared), self.content_start(index)) if shared else None

    def probe(self, index: int, key: object) -> int | None:
        """Render what is before a turn, keep its generation prompt for others, and give where it
        ends if the whole text begins with it.

        A template that does not ask whether it is to write one may write it always.
        """
        self.prompts.setdefault(key, None)
        if self.probes >= MOST_PROBES:
            return None
        self.probes += 1
        begin, text = self.extent(index)[0], self.rendering.text
        found = self.render_prompt(self.messages[:index])
        if found is None:
            return None
        asked, prompt = found
        if not text.startswith(asked) or not (self.template.asks or len(asked) > begin):
            self.prompts[key] = prompt
            return None
        self.settled.add(key)
        self.prompts[key] = text[begin : len(asked)] if len(asked) > begin else prompt
        inherited = any(text[begin:].startswith(found) for found in self.longest_prompts())
        return None if len(asked) == begin and inherited else len(asked)

    def probe_first(self, key: object) -> None:
        """Keep the generation prompt of a conversation that begins with a turn of the model: the
        one that follows a question."""
        found = self.render_prompt([{"role": "user", "content": mark(0)}])
        self.prompts[key] = None if found is None else found[1]
        self.settled.add(key)

    def render_prompt(self, before: Sequence[Message]) -> tuple[str, str | None] | None:
        """Return a conversation with the generation prompt that follows it, and this alone."""
        try:
            asked = self.template.render(before, self.tools, ask=True).text
            if not self.template.asks:
                return asked, None
            plain = self.template.render(before, self.tools).text
        except TemplateRefusedError:
            return None
        return asked, asked[len(plain) :] if asked.startswith(plain) else None

    def longest_prompts(self) -> list[str]:
        """The generation prompts that are known, the longest first."""
        return sorted({found for found in self.prompts.values() if found}, key=len, reverse=True)

    def key(self, index: int) -> object:
        """Return what decides a generation prompt: the message before."""
        before = self.messages[index - 1] if index else {}
        return before.get("role"), bool(before.get("tool_calls"))

    def extent(self, index: int) -> Span:
        """The first and the last character that the template writes for a message."""
        spans = self.rendering.turns[index]
        return spans[0][0], spans[-1][1]

    def content_start(self, index: int) -> int:
        """Return where a turn's text begins to depend on its content."""
        if self.differing is None:
            self.differing = self.find_differing()
        begin, end = self.extent(index)
        if index in self.differing:
            start = self.differing[index][0]
            return start if self.replaced is mark_turn else min(start, self.opened(index))
        found = (
            self.rendering.text.find(value.strip(), begin, end)
            for value in self.messages[index].values()
            if isinstance(value, str) and value.strip() and value != self.messages[index]["role"]
        )
        return min((place for place in found if place >= 0), default=begin)

    def find_differing(self) -> dict[int, Span]:
        """Return what of each wanted turn differs when all of them are replaced."""
        for replace in REPLACEMENTS:
            found = differences(
                self.template, self.messages, self.tools, self.rendering, self.wanted, replace
            )
            if found:
                self.replaced = replace
                return found
        return {}

    def opened(self, index: int) -> int:
        """Return where a turn leaves the text that one with nothing but a content begins with,
        where such turns would be refused among the others: tool calls begin with their mark."""
        key = self.key(index)
        if key not in self.openings:
            self.openings[key] = self.find_opening(index)
        begin, end = self.extent(index)
        opening = self.openings[key]
        return (
            end
            if opening is None
            else begin + common_prefix(opening, self.rendering.text[begin:end])
        )

    def find_opening(self, index: int) -> str | None:
        """Return what a template writes before the content of a turn that ends a conversation."""
        if self.probes >= MOST_PROBES:
            return None
        self.probes += 1
        before = [*self.messages[:index], mark_turn(self.messages[index], index)]
        try:
            other = self.template.render(before, self.tools)
        except TemplateRefusedError:
            return None
        spans = other.turns[index]
        text = other.text[spans[0][0] : spans[-1][1]] if spans else ""
        return text.partition(mark(index))[0] if mark(index) in text else None

    def locate(self, index: int) -> Span | None:
        """A turn that no loop of the template looks at, by its replacement alone."""
        text = self.rendering.text
        for replace in REPLACEMENTS:
            changed = list(self.messages)
            changed[index] = replace(changed[index], index)
            try:
                other = self.template.render(changed, self.tools).text
            except TemplateRefusedError:
                continue
            start, end = differing_span(text, other)
            return (start, end) if end > start else None
        return None


def mark_turn(message: Message, index: int) -> Message:
    """A message of the same role with nothing in it but a mark."""
    return {"role": message.get("role"), "content": mark(index)}


def mark_texts(message: Message, index: int) -> Message:
    """A message of the same form with other texts: content, reasoning, names and arguments of tool
    calls."""
    reasoning = {name: mark(index) for name in REASONING if name in message}
    calls = (
        {"tool_calls": mark_calls(message["tool_calls"], index)} if "tool_calls" in message else {}
    )
    return message | {"content": mark(index)} | reasoning | calls


def mark_calls(calls: Any, index: int) -> Any:
    """Tool calls with other names and arguments of the same types."""
    if isinstance(calls, list):
        return [mark_calls(call, index) for call in calls]
    if not isinstance(calls, dict):
        return calls
    changed = {name: mark_calls(value, index) for name, value in calls.items()}
    if isinstance(calls.get("name"), str):
        changed["name"] = mark(index)
    if "arguments" in calls:
        text = isinstance(calls["arguments"], str)
        changed["arguments"] = mark(index) if text else {mark(index): mark(index)}
    return changed


def mark_content(message: Message, index: int) -> Message:
    """A message with another content, and all else as it is."""
    return message | {"content": mark(index)}


def mark(index: int) -> str:
    """A content that begins like no other and that a template does not look into."""
    return f"\ue0d2{index}\ue0d3"


REPLACEMENTS: tuple[Callable[[Message, int], Message], ...] = (
    mark_turn,
    mark_texts,
    mark_content,
)


def differences(
    template: Template,
    messages: Sequence[Message],
    tools: list[Any] | None,
    rendering: Rendering,
    indices: Collection[int],
    replace: Callable[[Message, int], Message],
) -> dict[int, Span]:
    """Return what changes in the text of some messages when all of them are replaced; empty where
    the template refuses that."""
    chosen = set(indices)
    changed = [replace(m, i) if i in chosen else m for i, m in enumerate(messages)]
    try:
        other = template.render(changed, tools)
    except TemplateRefusedError:
        return {}
    found = {}
    for index in chosen:
        ours, theirs = rendering.turns[index], other.turns[index]
        if ours and theirs:
            begin = ours[0][0]
            left = rendering.text[begin : ours[-1][1]]
            right = other.text[theirs[0][0] : theirs[-1][1]]
            start, end = differing_span(left, right)
            found[index] = (begin + start, begin + end)
    return found


def differing_span(text: str, other: str) -> Span:
    """Return what of a text is not in another one, less their common beginning and end."""
    start = common_prefix(text, other)
    limit = min(len(text), len(other)) - start
    return start, len(text) - min(limit, common_prefix(text[::-1], other[::-1]))


def common_prefix(left: str, right: str) -> int:
    """Return how many characters two texts begin with in common, by bisection."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def span_tokens(located: Located, span: Span) -> slice:
    """The tokens that have characters of a span, those over its edges included."""
    first = int(located.ends.searchsorted(span[0], side="right"))
    return slice(first, max(first, int(located.starts.searchsorted(span[1], side="left"))))
