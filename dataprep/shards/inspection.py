"""A look into a shard directory: counts, ledger, document lengths, and rows as text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import track
from rich.text import Text
from tokenizers import Tokenizer

from headrace.dataprep.text.tokenizer import TOKENIZER_NAME
from headrace.dataprep.work.console_report import losses, print_ledger
from headrace.dataprep.work.workspace import REJECTS_NAME
from headrace.schemas.errors import DataError
from headrace.schemas.outside_text import parse_json, visible, visible_lines
from headrace.schemas.shards.arrow_numbers import numbers_of
from headrace.schemas.shards.manifest import Manifest, ShardRecord
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.schemas.shards.row_checks import problems_in_rows
from headrace.schemas.shards.shard_format import SIDES
from headrace.schemas.shards.shard_rows import open_shard, read_row_group

BAR_WIDTH = 40
LONGEST_LINE = 1 << 20  # of rejects.jsonl: bytes


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
    """Refused documents by source and reason, the most frequent first; ours, not foreign ones."""
    path = directory / REJECTS_NAME
    if not path.is_file():
        raise DataError(f"{path}: missing; run `headrace verify {directory}`")
    for (source, reason), count in read_rejects(path).most_common():
        line = f"refused in {source}: {reason}: {count:,} documents"
        console.print(Text(visible(line)), soft_wrap=True)


def read_rejects(path: Path) -> Counter[tuple[str, str]]:
    """Count refused documents by source and reason.

    Raises:
        DataError: a line is not what `prepare` writes.
    """
    counts: Counter[tuple[str, str]] = Counter()
    with path.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), b""), start=1):
            try:
                reject = parse_json(line.decode())
                counts[str(reject["source"]), str(reject["reason"])] += 1
            except (ValueError, LookupError, TypeError):
                raise DataError(
                    f"{path}:{number}: not a refused document; prepare the directory again"
                ) from None
    return counts


def print_histogram(directory: Path, manifest: Manifest, console: Console) -> None:
    """Lengths of the pieces of documents in rows, in powers of two."""
    counts: Counter[int] = Counter()
    for shard in track(manifest.shards, "lengths", console=console, transient=True):
        for _, rows in row_groups(directory, manifest, shard, ["document_lengths"]):
            lengths = numbers_of(pc.list_flatten(rows["document_lengths"]))
            counts.update(int(length).bit_length() for length in lengths)
    cut = "at row ends" if manifest.packing == "concatenate" else "only where they fit no row"
    console.print(f"tokens in a piece of a document (documents are cut {cut})")
    largest = max(counts.values(), default=1)
    for bits in range(min(counts, default=0), max(counts, default=-1) + 1):
        bar = "█" * round(BAR_WIDTH * counts[bits] / largest)
        console.print(f"{1 << bits - 1:>9,} to {(1 << bits) - 1:>9,}  {counts[bits]:>11,} {bar}")


def print_rows(directory: Path, manifest: Manifest, rows: int, console: Console) -> None:
    """The first rows of each split as text."""
    tokenizer = open_tokenizer(directory)
    for split in manifest.ledger.tokens_out:
        for name, row in islice(read_rows(directory, manifest, split), rows):
            console.rule(Text(visible(f"{name}, {row['source']}")))
            console.print(row_text(tokenizer, row, shows_no_style(console)), soft_wrap=True)
            print_pictures(row, console)


def print_pictures(row: dict[str, Any], console: Console) -> None:
    """A line for each picture of a row."""
    tiles = Counter(tile["picture"] for tile in row.get("images") or [])
    firsts = {tile["picture"]: tile for tile in reversed(row.get("images") or [])}
    for picture, count in tiles.items():
        tile = firsts[picture]
        console.print(
            f"picture {picture}: {tile['width']} x {tile['height']}, {count} tiles, "
            f"{tile['tokens']} tokens",
            highlight=False,
        )


def print_rows_of_keys(directory: Path, keys: Sequence[int], console: Console) -> None:
    """The rows with these keys, as `anomalies.jsonl` of a run names them, as text.

    Raises:
        DataError: no row has one of the keys.
    """
    manifest = read_manifest(directory)
    tokenizer = open_tokenizer(directory)
    missing = dict.fromkeys(keys)
    for shard in track(manifest.shards, "rows", console=console, transient=True):
        for group, table in row_groups(directory, manifest, shard):
            found = numbers_of(table["row_key"])
            places = np.flatnonzero(np.isin(found, np.array(keys, np.uint64)))
            for index, whole in zip(places.tolist(), table.take(places).to_pylist(), strict=True):
                row = without_runs(whole, manifest)
                missing.pop(row["row_key"], None)
                name = f"{shard.file} row {shard.rows_before(group) + index}"
                title = f"{name}, {row['source']}, key {row['row_key']}"
                console.rule(Text(visible(title)))
                console.print(row_text(tokenizer, row, shows_no_style(console)), soft_wrap=True)
                print_pictures(row, console)
    if missing:
        raise DataError(
            f"{directory}: no row has the key {', '.join(map(str, missing))}; look in the other "
            "datasets of the run"
        )


def read_rows(
    directory: Path, manifest: Manifest, split: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location of each row, and the row, in file order."""
    for shard in manifest.split(split):
        for group, table in row_groups(directory, manifest, shard):
            for index in range(table.num_rows):
                row = without_runs(table.slice(index, 1).to_pylist()[0], manifest)
                yield f"{shard.file} row {shard.rows_before(group) + index}", row


def without_runs(row: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """A row with one placeholder where pictures fill many one after the other."""
    if manifest.images is None:
        return row
    placeholder = manifest.images.placeholder_id
    changed = dict(row)
    for ids_name, mask_name in SIDES:
        if row.get(ids_name) is None:
            continue
        ids = np.array(row[ids_name])
        same = ids == placeholder
        kept = ~(same & np.append(False, same[:-1]))
        changed[ids_name] = ids[kept].tolist()
        if row[mask_name] is not None:
            changed[mask_name] = np.array(row[mask_name])[kept].tolist()
        if ids_name == "input_ids":
            ends = np.append(0, np.cumsum(kept))[np.cumsum(row["document_lengths"])]
            changed["document_lengths"] = np.diff(ends, prepend=0).tolist()
    return changed


def row_groups(
    directory: Path, manifest: Manifest, shard: ShardRecord, columns: list[str] | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """Yield the checked row groups of a shard, with their numbers.

    Raises:
        DataError: rows that are not what the manifest declares.
    """
    path = directory / shard.file
    if not path.is_file():
        raise DataError(f"{path}: missing; run `headrace verify {directory}`")
    group = 0
    try:
        with open_shard(path, manifest, shard) as file:
            for group in range(len(shard.row_groups)):
                table = read_row_group(file, group, manifest, shard, columns)
                for problem in problems_in_rows(table, manifest):
                    raise ValueError(problem)
                yield group, table
    except (ValueError, OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: row group {group}: {' '.join(str(error).split())}; "
            f"run `headrace verify {directory}`"
        ) from None


def shows_no_style(console: Console) -> bool:
    """Return whether dimmed text looks like other text: in a pipe, a file, or without color."""
    return console.color_system is None or console.no_color or not console.is_terminal


def row_text(tokenizer: Tokenizer, row: dict[str, Any], marked: bool = False) -> Text:
    """One row as text; of a pair first the better side."""
    ids, mask = row["input_ids"], row["loss_mask"]
    rejected = row.get("rejected_input_ids")
    if rejected is None:
        return side_text(tokenizer, ids, mask, row["document_lengths"], "", marked)
    worse = row["rejected_loss_mask"]
    text = side_text(tokenizer, ids, mask, [len(ids)], "chosen, ", marked)
    return text + side_text(tokenizer, rejected, worse, [len(rejected)], "rejected, ", marked)


def side_text(
    tokenizer: Tokenizer,
    ids: list[int],
    mask: list[bool] | None,
    lengths: list[int],
    label: str,
    marked: bool = False,
) -> Text:
    """Ids as text: a mark where a document begins, tokens without a loss dimmed."""
    marked = marked and mask is not None
    mask = mask or [True] * len(ids)
    text = Text()
    start = 0
    for length in lengths:
        text.append(f"┃{label}{length} tokens┃ ", style="bold cyan")
        for begin, end in runs(mask, start, start + length):
            part = visible_lines(tokenizer.decode(ids[begin:end], skip_special_tokens=False))
            shown = f"⟦{part}⟧" if marked and mask[begin] else part
            text.append(shown, style="" if mask[begin] else "dim")
        text.append("\n")
        start += length
    return text


def runs(mask: list[bool], start: int, end: int) -> list[tuple[int, int]]:
    """The stretches of equal mask within [start, end)."""
    cuts = [index for index in range(start + 1, end) if mask[index] != mask[index - 1]]
    return list(zip([start, *cuts], [*cuts, end], strict=True))


def open_tokenizer(directory: Path) -> Tokenizer:
    """The copy of the tokenizer that every shard directory has."""
    path = directory / TOKENIZER_NAME
    if not path.is_file():
        raise DataError(f"{path}: missing, so rows cannot be decoded; prepare the directory again")
    return Tokenizer.from_file(str(path))
