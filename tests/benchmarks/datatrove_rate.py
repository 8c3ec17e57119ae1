"""`prepare()` against datatrove 0.10's tokenize, shuffle and merge, on the same JSONL in one run.

The tokenizer alone, on all cores, is the most that any program can reach that uses it.

datatrove has its own environment, because it pins what it needs:

    python -m venv build/datatrove
    build/datatrove/bin/pip install datatrove==0.10.0 tokenizers==0.23.3 numpy orjson
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from dataprep_rate import time_prepare, time_tokenizer
from report import MODEL, print_table, write_jsonl

WORKERS = len(os.sched_getaffinity(0))
PROGRAM = """
import sys, time
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger

corpus, output, tokenizer, workers = *sys.argv[1:4], int(sys.argv[4])

def main():
    started = time.perf_counter()
    LocalPipelineExecutor(
        [
            JsonlReader(corpus),
            DocumentTokenizer(
                output + "/parts", tokenizer, eos_token="<|im_end|>", seed=0, shuffle_documents=True
            ),
        ],
        tasks=workers,
        workers=workers,
        logging_dir=output + "/log1",
    ).run()
    LocalPipelineExecutor(
        [
            DocumentTokenizerMerger(
                output + "/parts", output + "/merged", "all", seed=0, progress=False
            )
        ],
        logging_dir=output + "/log2",
    ).run()
    print("seconds", time.perf_counter() - started)

if __name__ == "__main__":
    main()
"""


def time_datatrove(python: Path, corpus: Path) -> tuple[float, int]:
    """Seconds without its imports, and bytes of the merged tokens."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text(PROGRAM)
        tokenizer = str((MODEL / "tokenizer.json").resolve())
        command = [python, program, corpus, f"{folder}/out", tokenizer, str(WORKERS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        size = sum(path.stat().st_size for path in Path(folder, "out/merged").glob("*.ds"))
        return float(done.stdout.split()[-1]), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", type=Path, default=Path("build/datatrove/bin/python"))
    parser.add_argument("--copies", type=int, default=16, help="of 12.6 MB of text")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not options.python.exists():
        sys.exit(f"{options.python} is missing; install it as the head of this file says")
    with tempfile.TemporaryDirectory() as folder:
        copies = -(-options.copies // WORKERS)
        texts: list[str] = []
        for worker in range(WORKERS):  # datatrove gives each worker whole files
            texts += write_jsonl(Path(folder) / f"{worker}.jsonl", copies, worker * copies)
        rounds = [
            (
                time_datatrove(options.python, Path(folder)),
                (time_tokenizer(texts),),
                time_prepare(Path(folder) / "*.jsonl", "tokenizers"),
                time_prepare(Path(folder) / "*.jsonl", "fastokens"),
            )
            for _ in range(options.rounds)
        ]
    ledger = rounds[0][2][1].ledger
    tokens = ledger.tokens_in
    assert tokens == rounds[0][0][1] // 2, "datatrove has other tokens"  # two bytes each
    names = (
        "datatrove 0.10.0",
        "tokenizer alone",
        "headrace prepare",
        "headrace prepare, fastokens",
    )
    rows = []
    for place, name in enumerate(names):
        seconds = median(results[place][0] for results in rounds)
        ratio = median(results[0][0] / results[place][0] for results in rounds)
        rows.append((name, f"{seconds:.2f}", f"{tokens / seconds / 1e6:.2f}", f"{ratio:.2f}"))
    print_table(
        f"{tokens / 1e6:.1f} M tokens, {WORKERS} workers, median of {options.rounds} rounds",
        ("", "seconds", "M tokens/s", "times datatrove"),
        rows,
    )


if __name__ == "__main__":
    main()
