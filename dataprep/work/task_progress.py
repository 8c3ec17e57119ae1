"""Progress of running tasks: workers leave a note after each block, and a bar reads the notes."""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from headrace.dataprep.input.pieces import Task
from headrace.dataprep.work.reporter import Bar, Reporter, Unseen
from headrace.dataprep.work.workspace import Workspace, notes_folder
from headrace.schemas.publish import create_file

BYTES_IN_TOKEN = 3.5  # until a task is finished


def note_path(output: Path, task: int) -> Path:
    """Return the path of a running task's note."""
    return notes_folder(output) / f"task-{task:06d}.progress"


def write_note(space: Workspace, task: int, documents: int, tokens: int) -> None:
    """Leave a note; it decides nothing but the bar."""
    path = note_path(space.output, task)
    unfinished = space.temporary(path)
    with create_file(unfinished) as file:
        file.write(f"{documents} {tokens}".encode())
    unfinished.replace(path)


def read_note(path: Path) -> tuple[int, int]:
    """Documents and tokens of a running task; none without a note."""
    try:
        documents, tokens = path.read_text().split()
        return int(documents), int(tokens)
    except OSError:
        return 0, 0


class TaskBar:
    """A bar over the input bytes of tasks, with documents, tokens, rate, and time left."""

    def __init__(
        self, reporter: Reporter, title: str, space: Workspace, todo: Sequence[Task]
    ) -> None:
        self.reporter = reporter
        self.title = title
        self.output = space.output
        self.poll_seconds = space.budgets.poll_seconds
        self.total = sum(task.size for task in todo)
        self.running = {task.number: task for task in todo}
        self.documents = 0
        self.tokens = 0
        self.bytes = 0
        self.lock = threading.Lock()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.poll, daemon=True)
        self.bar: Bar = Unseen()
        self.stack = ExitStack()

    def __enter__(self) -> "TaskBar":
        for number in self.running:
            note_path(self.output, number).unlink(missing_ok=True)  # of a run that was killed
        self.bar = self.stack.enter_context(self.reporter.bar(self.title, self.total))
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()
        self.show()
        self.stack.close()

    def finish(self, task: Task, documents: int, tokens: int) -> None:
        """Count a finished task."""
        with self.lock:
            del self.running[task.number]
            self.documents += documents
            self.tokens += tokens
            self.bytes += task.size
        note_path(self.output, task.number).unlink(missing_ok=True)

    def poll(self) -> None:
        """Show how far the running tasks are, now and then."""
        while not self.done.wait(self.poll_seconds):
            self.show()

    def show(self) -> None:
        """Bring the bar up to date."""
        with self.lock:
            documents, tokens, size = self.documents, self.tokens, float(self.bytes)
            ratio = size / tokens if tokens else BYTES_IN_TOKEN
            for path in sorted(notes_folder(self.output).glob("task-*.progress")):
                task = self.running.get(int(path.stem.removeprefix("task-")))
                if task is not None:
                    more_documents, more_tokens = read_note(path)
                    documents += more_documents
                    tokens += more_tokens
                    size += min(task.size, more_tokens * ratio)
        self.bar.update(size, f"{documents:,} documents, {tokens:,} tokens")
