"""`prepare()` against the tokenizer alone, on the same texts and cores in the same run."""

import io
import os
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

from report import MODEL, peak_gib, print_table, text_config
from rich.console import Console
from tokenizers import Tokenizer

from headrace.dataprep.inputs import find_inputs
from headrace.dataprep.prepare import prepare
from headrace.schemas.manifest import Manifest

ROUNDS = 3
COPIES = (1, 4)  # of the text: what starting costs, and what the rate is beyond it
WORKERS = len(os.sched_getaffinity(0))


def time_prepare(copies: int) -> tuple[float, Manifest]:
    """Median seconds from the start to the published manifest."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            started = time.perf_counter()
            config = text_config(Path(folder) / str(number), copies)
            manifest = prepare(config, WORKERS, Console(file=io.StringIO()))
            seconds.append(time.perf_counter() - started)
    return median(seconds), manifest


def read_texts(copies: int) -> list[str]:
    """The same files in the same order; those that `prepare` refuses are empty."""
    sources = find_inputs(text_config(Path("unused"), copies))
    return [Path(file.path).read_text("utf-8") for files in sources for file in files]


def time_tokenizer(texts: list[str]) -> tuple[float, int]:
    """Median seconds, and tokens, of one call over all texts, on all cores."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        seconds.append(time.perf_counter() - started)
    return median(seconds), sum(len(encoding) for encoding in encodings)


def main() -> None:
    ours = {copies: time_prepare(copies) for copies in COPIES}
    memory = peak_gib(), peak_gib(resource.RUSAGE_CHILDREN)  # before any text is held here
    rows = []
    for copies, (seconds, manifest) in ours.items():
        texts = read_texts(copies)
        reference, tokens = time_tokenizer(texts)
        documents = sum(record.documents for record in manifest.sources)
        assert manifest.ledger.tokens_in == tokens + documents, "differs by more than EOS tokens"
        size = f"{sum(len(text.encode()) for text in texts) / 1e6:.1f}"
        for name, spent in (("tokenizer alone", reference), ("headrace prepare", seconds)):
            rate, ratio = tokens / spent / 1e6, spent / reference
            rows.append((name, size, f"{spent:.2f}", f"{rate:.2f}", f"{ratio:.2f}"))
    stored = sum(shard.bytes for shard in manifest.shards) / manifest.ledger.tokens_in
    print_table(
        f"{WORKERS} workers, median of {ROUNDS}; {stored:.2f} bytes a token on disk; "
        f"peak {memory[0]:.2f} GiB + {memory[1]:.2f} GiB a worker",
        ("", "MB of text", "seconds", "M tokens/s", "times the tokenizer"),
        rows,
    )


if __name__ == "__main__":
    main()
