"""Output of `headrace inspect`: counts, ledger, document lengths, and rows as text."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from headrace.dataprep.shards.inspection import (
    count_lengths,
    open_tokenizer,
    read_rejects,
    read_rows,
    row_spans,
    rows_of_keys,
)
from headrace.dataprep.text.chat_losses import losses
from headrace.jobs.console.ledger import print_ledger
from headrace.jobs.console.progress import tracked
from headrace.schemas.outside_text import visible
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.manifest_file import read_manifest

BAR_WIDTH = 40
STYLES = {"mark": "bold cyan", "masked": "dim", "trained": "", "plain": ""}


def inspect(directory: Path, rows: int, console: Console) -> None:
    """Print what a finished shard directory holds, and the first `rows` rows of each split.

    Raises:
        DataError: not a finished shard directory, or its tokenizer's copy is missing.
    """
    manifest = read_manifest(directory)
    console.print(
        f"{directory}: {len(manifest.shards)} files, rows of {manifest.sequence_len} tokens, "
        f"packing {manifest.packing}, seed {manifest.seed}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    print_ledger(console, manifest)
    for line in losses(manifest):
        console.print(Text(line), soft_wrap=True)
    if manifest.columns is None:
        print_rejects(directory, console)
    print_histogram(directory, manifest, console)
    if rows:
        print_rows(directory, manifest, rows, console)


def print_rejects(directory: Path, console: Console) -> None:
    """Print refused documents by source and reason, the most frequent first."""
    for (source, reason), count in read_rejects(directory).most_common():
        line = f"refused in {source}: {reason}: {count:,} documents"
        console.print(Text(visible(line)), soft_wrap=True)


def print_histogram(directory: Path, manifest: Manifest, console: Console) -> None:
    """Print the lengths of the pieces of documents in rows, in powers of two."""
    counts = count_lengths(directory, manifest, partial(tracked, console=console))
    cut = "at row ends" if manifest.packing == "concatenate" else "only where they fit no row"
    console.print(f"tokens in a piece of a document (documents are cut {cut})")
    largest = max(counts.values(), default=1)
    for bits in range(min(counts, default=0), max(counts, default=-1) + 1):
        bar = "█" * round(BAR_WIDTH * counts[bits] / largest)
        console.print(f"{1 << bits - 1:>9,} to {(1 << bits) - 1:>9,}  {counts[bits]:>11,} {bar}")


def print_rows(directory: Path, manifest: Manifest, rows: int, console: Console) -> None:
    """Print the first rows of each split as text."""
    tokenizer = open_tokenizer(directory)
    for split in manifest.ledger.tokens_out:
        for name, row in islice(read_rows(directory, manifest, split), rows):
            console.rule(Text(visible(f"{name}, {row['source']}")))
            console.print(row_text(tokenizer, row, console), soft_wrap=True)
            print_pictures(row, console)


def print_rows_of_keys(directory: Path, keys: Sequence[int], console: Console) -> None:
    """Print the rows with these keys, as `anomalies.jsonl` of a run names them, as text.

    Raises:
        DataError: no row has one of the keys.
    """
    tokenizer = open_tokenizer(directory)
    progress = partial(tracked, console=console)
    for name, row in rows_of_keys(directory, read_manifest(directory), keys, progress):
        console.rule(Text(visible(f"{name}, {row['source']}, key {row['row_key']}")))
        console.print(row_text(tokenizer, row, console), soft_wrap=True)
        print_pictures(row, console)


def print_pictures(row: dict[str, Any], console: Console) -> None:
    """Print a line for each picture of a row."""
    tiles = Counter(tile["picture"] for tile in row.get("images") or [])
    firsts = {tile["picture"]: tile for tile in reversed(row.get("images") or [])}
    for picture, count in tiles.items():
        tile = firsts[picture]
        console.print(
            f"picture {picture}: {tile['width']} x {tile['height']}, {count} tiles, "
            f"{tile['tokens']} tokens",
            highlight=False,
        )


def row_text(tokenizer: Tokenizer, row: dict[str, Any], console: Console) -> Text:
    """Return one row: tokens without a loss dimmed; where none is, the others in brackets."""
    marked = shows_no_style(console)
    text = Text()
    for part, style in row_spans(tokenizer, row):
        text.append(f"⟦{part}⟧" if marked and style == "trained" else part, STYLES[style])
    return text


def shows_no_style(console: Console) -> bool:
    """Return whether dimmed text looks like other text: in a pipe, a file, or without color."""
    return console.color_system is None or console.no_color or not console.is_terminal
