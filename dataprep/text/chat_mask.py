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
    for index in indices:
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
        self.probes = 0
        self.differing: dict[int, Span] | None = None

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
        if self.messages[index].get("role") in OTHERS or not self.template.asks:
            return None
        begin, end = self.extent(index)
        key = self.key(index)
        if key not in self.prompts:
            start = self.probe(index, key)
            if start is not None:
                return start
        text, own = self.rendering.text, self.prompts[key]
        if own and text.startswith(own, begin, end):
            return begin + len(own)
        for prompt in self.longest_prompts():
            if text.startswith(prompt, begin, end):
                return begin + len(prompt)
        if own == "":
            return begin
        return None if own is None else self.shared_start(index, own)

    def shared_start(self, index: int, prompt: str) -> int | None:
        """Return where a turn leaves a generation prompt that it does not follow to its end."""
        begin, end = self.extent(index)
        shared = begin + common_prefix(prompt, self.rendering.text[begin:end])
        return min(shared, self.content_start(index)) if shared > begin else None

    def probe(self, index: int, key: object) -> int | None:
        """Render what is before a turn, keep its generation prompt for others, and give where it
        ends if the whole text begins with it."""
        self.prompts[key] = None
        if self.probes >= MOST_PROBES:
            return None
        self.probes += 1
        before = self.messages[:index]
        begin = self.extent(index)[0]
        try:
            asked = self.template.render(before, self.tools, ask=True).text
            plain = self.template.render(before, self.tools).text
        except TemplateRefusedError:
            return None
        if asked.startswith(plain):
            self.prompts[key] = asked[len(plain) :]
        text = self.rendering.text
        if not text.startswith(asked):
            return None
        if len(asked) > begin:
            self.prompts[key] = text[begin : len(asked)]
        inherited = any(text[begin:].startswith(found) for found in self.longest_prompts())
        return None if len(asked) == begin and inherited else len(asked)

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
        if index in self.differing:
            return self.differing[index][0]
        begin, end = self.extent(index)
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
                return found
        return {}

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
