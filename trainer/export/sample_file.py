"""Answers to every line of a JSONL file; stopped and run again, it goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any

from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.progress import Progress, silent
from headrace.trainer.export.sample import Messages, Sampler, Sampling, as_messages, batches


def sample_file(
    sampler: Sampler,
    source: Path,
    output: Path,
    sampling: Sampling,
    *,
    chat: bool = False,
    system: str | None = None,
    compare: bool = False,
    batch_size: int = 8,
    progress: Progress = silent,
) -> int:
    """Answer each line's `prompt` (text) or `messages`; `response` is added to what it holds.

    Whole batches are written, so that an interrupted run continues to the same bytes.

    Args:
        chat: take a text for a user's turn.
        compare: add `response_without_adapter`.

    Returns:
        How many lines were answered now.

    Raises:
        ConfigError, DataError: what cannot be read, with its line; an output of another input.
    """
    records = read_records(source)
    prompts = [prompt_of(source, n, record, chat, system) for n, record in enumerate(records)]
    done = finished_lines(output, records)
    start = len(done) if len(done) == len(records) else len(done) // batch_size * batch_size
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("r+" if output.exists() else "w", encoding="utf-8") as file:
        file.truncate(sum(len(line.encode()) for line in done[:start]))
        file.seek(0, os.SEEK_END)
        parts = batches(sampler, prompts, start, batch_size, sampling, compare)
        at = start
        sizes = [min(batch_size, len(records) - n) for n in range(start, len(records), batch_size)]
        for answers in progress(parts, sizes, "answering", "answers"):
            for record, answer in zip(records[at : at + len(answers)], answers, strict=True):
                file.write(json.dumps(record | answer, ensure_ascii=False) + "\n")
            file.flush()
            at += len(answers)
    return len(records) - start


def read_records(source: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, empty lines left out."""
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read ({error})") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source}:{number}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f'{source}:{number}: not an object with "prompt" or "messages"')
        records.append(record)
    return records


def prompt_of(
    source: Path, number: int, record: dict[str, Any], chat: bool, system: str | None
) -> str | Messages:
    """Return the prompt of a record."""
    messages, prompt = record.get("messages"), record.get("prompt")
    if isinstance(messages, list) and messages:
        return messages
    if isinstance(prompt, str) and prompt:
        return as_messages(prompt, system) if chat else prompt
    raise DataError(f'{source}: record {number + 1} has neither a text "prompt" nor "messages"')


def finished_lines(output: Path, records: list[dict[str, Any]]) -> list[str]:
    """Whole lines that an earlier run has written, if they belong to these records."""
    if not output.exists():
        return []
    lines = output.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    for number, line in enumerate(whole):
        known = number < len(records) and json.loads(line).items() >= records[number].items()
        if not known:
            raise ConfigError(
                f"{output}:{number + 1}: answers another input; remove it or choose another "
                "--output"
            )
    return whole
