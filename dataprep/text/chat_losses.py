"""Counts of what a rendering leaves out of a conversation's messages."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from headrace.dataprep.images.picture_places import PLACE
from headrace.dataprep.text.chat_mask import RenderedChat
from headrace.dataprep.text.rendering import REASONING, Message
from headrace.schemas.outside_text import visible
from headrace.schemas.shards.manifest import Manifest

CALLS = ("tool_calls", "function_call")
FURTHER = frozenset([*REASONING, *CALLS])
USUAL = ("system", "developer", "user", "assistant", "tool")
UNWRITTEN = "that the chat template does not write"
ABSENT = "a role that none of these documents has"  # worth a word only where all lack it


def absent_role(role: str, named: Iterable[str] = ()) -> str:
    """Return the note of a conversation without a role that is to be trained.

    Args:
        named: further roles that the config knows.
    """
    nearest = get_close_matches(role, sorted({*USUAL, *named} - {role}), n=1)
    hint = f' (did you mean "{nearest[0]}"?)' if nearest else ""
    return f'train_on names "{role}"{hint}, {ABSENT}'


def absent_roles(notes: Mapping[str, int], documents: int) -> list[str]:
    """Return the notes of roles that no document of a source has."""
    return [note for note, count in notes.items() if note.endswith(ABSENT) and count >= documents]


def is_loss(name: str, count: int, documents: int) -> bool:
    """Return whether a note is worth a word: a role only where all documents lack it."""
    return not name.endswith(ABSENT) or count >= documents


def losses(manifest: Manifest) -> list[str]:
    """A line for each kind of loss of each source, with its count."""
    return [
        visible(f'source "{source.name}": {name}: {count}')
        for source in manifest.sources
        for name, count in source.notes.items()
        if is_loss(name, count, source.documents)
    ]


def text_losses(messages: Sequence[Message], chat: RenderedChat) -> Counter[str]:
    """Count the messages whose content, reasoning or tool calls the template left out."""
    notes: Counter[str] = Counter()
    for index, message in enumerate(messages):
        begin = chat.begins[index]
        end = chat.next_begin(index)
        text = chat.text if begin is None else chat.text[begin:end]
        if message.get("content") and not writes(text, message["content"]):
            elsewhere = begin is not None and writes(chat.text, message["content"])
            if not elsewhere:
                notes[f'contents of role "{message.get("role")}" {UNWRITTEN}'] += 1
        if not message.keys().isdisjoint(FURTHER):
            notes.update(further_losses(message, text))
    return notes


def further_losses(message: Message, text: str) -> Iterator[str]:
    """Yield what a message's text lacks beside its content."""
    reasoning = next((name for name in REASONING if message.get(name)), None)
    if reasoning is not None and not writes(text, message[reasoning]):
        yield f"{reasoning} {UNWRITTEN}"
    for name in CALLS:
        if not all(called in text for called in names(message.get(name))):
            yield f"{name} {UNWRITTEN}"


def writes(text: str, value: Any) -> bool:
    """Return whether a text holds a value, or what follows its reasoning, as it is or in JSON."""
    if not isinstance(value, str):
        return True
    pieces = [piece.strip() for piece in value.split("</think>")[-1].split(PLACE)]
    return all(p in text or json.dumps(p, ensure_ascii=False)[1:-1] in text for p in pieces)


def names(calls: object) -> Iterator[str]:
    """The names of functions in some tool calls."""
    if isinstance(calls, list):
        for call in calls:
            yield from names(call)
    elif isinstance(calls, dict):
        own = calls.get("name")
        if isinstance(own, str):
            yield own
        else:
            yield from names(calls.get("function"))
