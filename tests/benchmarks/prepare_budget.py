"""Processor time of `prepare()` by phase, against the faster tokenizer alone on the same texts."""

import argparse
import cProfile
import os
import pstats
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

from report import MODEL, jsonl_config, print_table, write_jsonl

from headrace.dataprep.prepare import prepare
from headrace.dataprep.work.local_engine import use_one_thread

WORKERS = len(os.sched_getaffinity(0))
BATCH = 1 << 19  # characters
PHASES = {  # functions, of which none is called by another
    "tokenizers opened, config checked": ["build_context"],
    "read and parsed": ["read_blocks"],
    "tokenized": ["<method 'encode_batch_flat' of 'builtins.Tokenizer' objects>"],
    "compared with tokenizers": ["<method 'encode_batch_fast' of 'tokenizers.Tokenizer' objects>"],
    "ends added": ["surround_all"],
    "split chosen": ["settle"],
    "packed": ["pack_samples"],
    "row keys": ["row_keys"],
    "sorted and written between tasks and shards": ["flush"],
    "gathered for shards": ["row_groups"],
    "Parquet: split bytes, zstd, checksums": ["write_table"],
    "counted": ["count_tokens", "count_trained"],
    "SHA-256 and CRC-32": ["file_sha256", "with_checksums"],
    "made durable": ["fsync_path"],
    "manifest and report": ["build_manifest", "write_report"],
}


def processor_time() -> float:
    """Seconds of this process, of the one that forks workers, and of their children that ended."""
    return sum(os.times()[:4]) + forked_time()


def forked_time() -> float:
    """Seconds of the process that forks workers and of the workers, which are its children."""
    server = forkserver._forkserver._forkserver_pid
    if server is None:
        return 0.0
    fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of processors."""
    started, before = time.perf_counter(), processor_time()
    work()
    return time.perf_counter() - started, processor_time() - before


def tokenizer_alone(texts: list[str]) -> None:
    """All texts in batches, on one core."""
    import fastokens

    tokenizer = fastokens.Tokenizer.from_json_str((MODEL / "tokenizer.json").read_text())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    batch: list[str] = []
    size = 0
    for text in [*texts, ""]:
        if size >= BATCH or not text:
            tokenizer.encode_batch_flat(batch, add_special_tokens=False, split_special_tokens=True)
            batch, size = [], 0
        batch.append(text)
        size += len(text)


def seconds_of(stats: pstats.Stats, names: list[str]) -> float:
    """Seconds in some functions and what they call; of our own flush and write_table alone."""
    found = 0.0
    for (file, _, name), (_, _, _, cumulated, _) in stats.stats.items():  # type: ignore[attr-defined]
        ours = name not in ("flush", "write_table") or file.endswith(
            ("sorted_runs.py", "parquet/core.py")
        )
        found += cumulated if name in names and ours else 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=16, help="of 12.6 MB of text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_jsonl(folder / "corpus.jsonl", options.copies)
        small = folder / "small.jsonl"
        small.write_text('{"text": "mill"}\n' * 100)

        def run(output: str, corpus: Path, workers: int) -> int:
            config = jsonl_config(folder / output, corpus, "fastokens")
            return prepare(config, workers).ledger.tokens_in

        wall, several = spent(lambda: run("several", folder / "corpus.jsonl", WORKERS))
        use_one_thread()
        _, start = spent(lambda: run("start", small, 1))
        profile = cProfile.Profile(time.process_time)
        tokens = profile.runcall(run, "profiled", folder / "corpus.jsonl", 1)
        _, alone = spent(lambda: tokenizer_alone(texts))
    stats = pstats.Stats(profile)
    total = max(cumulated for _, _, _, cumulated, _ in stats.stats.values())  # type: ignore[attr-defined]
    phases = {phase: seconds_of(stats, names) for phase, names in PHASES.items()}
    phases["the rest"] = total - sum(phases.values())
    ns = 1e9 / tokens
    print_table(
        f"{tokens / 1e6:.1f} M tokens; fastokens alone {alone * ns:.1f} ns each; {WORKERS} workers "
        f"{several * ns:.1f} ns of processors, {several / alone:.1f} times that, at "
        f"{tokens / wall / 1e6:.1f} M tokens/s; a run of nothing: {start:.1f} s in one process. "
        "Below: one process under a profiler, which makes calls of Python slower",
        ("", "seconds", "ns a token", "share"),
        [
            (phase, f"{seconds:.2f}", f"{seconds * ns:.1f}", f"{seconds / total:.0%}")
            for phase, seconds in [*phases.items(), ("all", total)]
        ],
    )


if __name__ == "__main__":
    main()
