"""What the benchmarks share: the real text, memory, and the table at the end. Imports no torch."""

import json
import os
import resource
import signal
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headrace.dataprep.input.files import find_inputs
from headrace.schemas.prepare.prepare_config import PrepareConfig

MODEL = Path("models/smollm2-135m")
STDLIB = Path(sysconfig.get_paths()["stdlib"])


def text_config(
    output: Path, copies: int = 1, sequence_len: int = 1024, backend: str = "tokenizers"
) -> PrepareConfig:
    """The standard library's own sources, tests left out, several times over."""
    exclude = ["*/site-packages/*", "*/test/*", "*/tests/*"]
    text = {"type": "text", "path": str(STDLIB / "**/*.py"), "exclude": exclude}
    settings = {
        "output": str(output),
        "tokenizer": str(MODEL),
        "tokenizer_backend": backend,
        "sequence_len": sequence_len,
        "max_reject_fraction": 0.01,
        "sources": [{"name": f"copy {number}", **text} for number in range(copies)],
    }
    return PrepareConfig.model_validate(settings)


def write_jsonl(path: Path, copies: int, first: int = 0) -> list[str]:
    """The same texts as JSONL, each copy with its number in it; returns the texts."""
    files = find_inputs(text_config(Path("unused")).sources)[0]
    sources = [text for file in files if (text := Path(file.path).read_text("utf-8"))]
    texts = [f"# copy {first + copy}\n{text}" for copy in range(copies) for text in sources]
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return texts


def jsonl_config(output: Path, corpus: Path, backend: str) -> PrepareConfig:
    """What `write_jsonl` wrote, with defaults."""
    return PrepareConfig.model_validate(
        {
            "output": str(output),
            "tokenizer": str(MODEL),
            "tokenizer_backend": backend,
            "sources": [{"name": "code", "type": "documents", "path": str(corpus)}],
        }
    )


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A small table under a line of what was measured; the first column names the row."""
    table = Table(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=100, highlight=False)
    console.print(title)
    console.print(table)


def last_line_of(command: Sequence[str], limit: float) -> dict[str, object]:
    """The JSON object that a command prints last, or why there is none.

    Args:
        limit: seconds after which it is killed, and all that it started.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its ranks die with it
        output, errors = process.communicate()
        return {"error": f"not done in {limit:.0f} s", "output": (output + errors)[-2000:]}
    if process.returncode:
        return {"error": f"exit code {process.returncode}", "output": (output + errors)[-2000:]}
    found: dict[str, object] = json.loads(output.splitlines()[-1])
    return found
