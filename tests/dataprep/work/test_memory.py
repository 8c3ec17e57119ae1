"""Memory of all processes together is bounded, and the same for a corpus 20 times larger."""

import json
import logging
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

LIMIT = 2 << 30  # bytes
SCRIPT = """
import sys
from pathlib import Path
from headrace.dataprep.prepare import prepare
from headrace.dataprep.work.budgets import Budgets
from headrace.schemas.prepare.prepare_config import PrepareConfig
if __name__ == "__main__":
    held = int(sys.argv[2])
    budgets = Budgets(held_tokens=held, gathered_tokens=held) if held else None
    config = PrepareConfig.model_validate_json(Path(sys.argv[1]).read_text())
    prepare(config, 2, budgets=budgets)
"""


def family(pid):
    """A process and all below it."""
    found = [pid]
    for process in found:
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def memory(pid):
    """Bytes of a process in RAM, shared pages divided among those that share them (PSS)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def peak_memory(config, held_tokens):
    """The most that `prepare` with two workers holds at any moment, in all its processes.

    Args:
        held_tokens: what is sorted and gathered at once; 0: as much as in any run.
    """
    Path("script.py").write_text(SCRIPT)
    Path("config.json").write_text(config.model_dump_json())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "script.py", "config.json", str(held_tokens)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(memory, family(process.pid))))
        time.sleep(0.05)
    assert process.returncode == 0
    return peak


def write_corpus(folder, size):
    """JSONL of real text, of about `size` bytes, in documents that repeat."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    lines = [json.dumps({"text": path.read_text("utf-8")}) + "\n" for path in paths]
    written = 0
    folder.mkdir()
    with (folder / "corpus.jsonl").open("w") as file:
        while written < size:
            for line in lines:
                written += file.write(line) if written < size else 0


def compare(make_config, sizes, held_tokens=0, growth=1.2, **changes):
    """The most memory for two corpora, of which the larger may take `growth` times as much."""
    peaks = []
    for size in sizes:
        name = f"corpus-{size}"
        write_corpus(Path(name), size)
        sources = [{"name": "text", "type": "documents", "path": f"{name}/corpus.jsonl"}]
        values = {"sources": sources, "sequence_len": 1024, "row_group_tokens": 1 << 20}
        peaks.append(peak_memory(make_config(f"out-{size}", **(values | changes)), held_tokens))
    small, large = peaks
    logging.info("%s MiB of corpus take %s MiB", *([n >> 20 for n in a] for a in (sizes, peaks)))
    assert small > 100 << 20
    assert max(peaks) < LIMIT
    assert large < growth * small


@pytest.mark.slow
def test_memory_is_bounded_and_does_not_grow_with_the_corpus(corpus, make_config):
    """With less held at once, so that the small corpus is also more than that."""
    sizes = (1 << 19, 10 << 20)
    changes = {"block_bytes": 1 << 16, "row_group_tokens": 1 << 14}
    compare(make_config, sizes, held_tokens=1 << 16, growth=1.35, **changes)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_from_100_megabytes_to_2_gigabytes(corpus, make_config):
    """100 MiB are more than what is held at once, so that all that is reused has been in use."""
    pytest.importorskip("fastokens")  # 14 times as fast as `tokenizers`
    tokenizer = str(Path(__file__).parents[3] / "models" / "smollm2-135m")
    changes = {"tokenizer": tokenizer, "tokenizer_backend": "fastokens", "block_bytes": 4 << 20}
    compare(make_config, (100 << 20, 2000 << 20), **changes, shards=8)
