"""Answers to chosen prompts, as evaluations give them: a file of lines, and a table of one time."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace.schemas.publish import write_atomic, writing

ANSWERS_NAME = "answers.jsonl"
COLUMNS = ("prompt", "answer", "expected")


@dataclass(frozen=True)
class PromptedAnswer:
    """A prompt and what the model made of it; `expected` is the answer of the row it comes from."""

    prompt: str
    answer: str
    tokens: int
    ended: bool  # by a stop token, not by its limit
    expected: str | None = None


class AnswersLog:
    """`answers.jsonl` in a run directory, a line an answer; there once there is one.

    Args:
        step: resume point; answers after it are taken back.
        remedy: what to do where it cannot be written.
    """

    def __init__(self, directory: Path, step: int, remedy: str) -> None:
        self.path, self.remedy = directory / ANSWERS_NAME, remedy
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = [line.decode() for line in lines if step_of(line) <= step]
            with writing(self.path, remedy):
                write_atomic(self.path, "".join(kept))

    def write(self, step: int, answers: Sequence[PromptedAnswer]) -> None:
        """Add the answers of one evaluation."""
        lines = [json.dumps({"step": step, **asdict(answer)}) + "\n" for answer in answers]
        with writing(self.path, self.remedy), self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)


def step_of(line: bytes) -> float:
    """Return the step of a line; of one that is cut off or damaged, more than any."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def cells_of(answers: Sequence[PromptedAnswer]) -> list[list[str]]:
    """Return a table's rows, by `COLUMNS`."""
    return [[answer.prompt, answer.answer, answer.expected or ""] for answer in answers]


def as_markdown(answers: Sequence[PromptedAnswer]) -> str:
    """Return a table for TensorBoard, texts quoted so that nothing in them counts as markup."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(map(quoted, row) for row in cells_of(answers))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def quoted(text: str) -> str:
    """Return a text as a cell: on one line, without what would end the cell or begin a tag."""
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;")):
        text = text.replace(mark, entity)
    return text.replace("\n", "<br>").replace("`", "&#96;").replace("*", "&#42;")
