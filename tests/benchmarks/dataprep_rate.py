"""`prepare()` from JSONL against the tokenizer alone, on the same texts and cores in one run."""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from report import MODEL, jsonl_config, print_table, write_jsonl
from tokenizers import Tokenizer

from headrace.dataprep.prepare import prepare
from headrace.schemas.shards.manifest import Manifest

WORKERS = len(os.sched_getaffinity(0))
BATCH = 512  # texts of 15 KB on average


def time_prepare(corpus: Path, backend: str) -> tuple[float, Manifest]:
    """Seconds from the start to the published manifest."""
    with tempfile.TemporaryDirectory() as folder:
        config = jsonl_config(Path(folder, "shards"), corpus, backend)
        started = time.perf_counter()
        manifest = prepare(config, WORKERS)
        return time.perf_counter() - started, manifest


def time_tokenizer(texts: list[str]) -> float:
    """Seconds over all texts, on all cores, in batches: encodings take 100 bytes a token."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    started = time.perf_counter()
    for start in range(0, len(texts), BATCH):
        tokenizer.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=16, help="of 12.6 MB of text")
    parser.add_argument("--fast-copies", type=int, default=16, help="for the faster tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        corpus, large = Path(folder) / "corpus.jsonl", Path(folder) / "large.jsonl"
        texts = write_jsonl(corpus, options.copies)
        write_jsonl(large, options.fast_copies)
        ways = {
            "tokenizer alone": lambda: (time_tokenizer(texts), None),
            "headrace prepare": lambda: time_prepare(corpus, "tokenizers"),
            "headrace prepare, fastokens": lambda: time_prepare(large, "fastokens"),
        }
        rounds = [[way() for way in ways.values()] for _ in range(options.rounds)]
    manifests = [manifest for _, manifest in rounds[0]]
    tokens = [(manifest or manifests[1]).ledger.tokens_in for manifest in manifests]
    rates = [
        median(count / results[place][0] for results in rounds) / 1e6
        for place, count in enumerate(tokens)
    ]
    ratios = [
        median(results[0][0] / tokens[0] / (results[place][0] / count) for results in rounds)
        for place, count in enumerate(tokens)
    ]
    ledger = manifests[1].ledger
    stored = sum(shard.bytes for shard in manifests[1].shards) / sum(ledger.tokens_out.values())
    print_table(
        f"{WORKERS} workers, median of {options.rounds} rounds; {stored:.2f} bytes a token; load "
        f"{before:.1f} to {os.getloadavg()[0]:.1f}",
        ("", "M tokens", "M tokens/s", "of the tokenizer's rate"),
        [
            (name, f"{count / 1e6:.1f}", f"{rate:.2f}", f"{ratio:.2f}")
            for name, count, rate, ratio in zip(ways, tokens, rates, ratios, strict=True)
        ],
    )


if __name__ == "__main__":
    main()
