"""A look into a shard directory: refusals, document lengths, and rows as text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from headrace.dataprep.text.tokenizer import TOKENIZER_NAME
from headrace.dataprep.work.workspace import REJECTS_NAME
from headrace.schemas.errors import DataError
from headrace.schemas.outside_text import parse_json, visible_lines
from headrace.schemas.progress import Progress, silent
from headrace.schemas.shards.arrow_numbers import numbers_of
from headrace.schemas.shards.manifest import Manifest, ShardRecord
from headrace.schemas.shards.row_checks import problems_in_rows
from headrace.schemas.shards.shard_format import SIDES
from headrace.schemas.shards.shard_rows import open_shard, read_row_group

LONGEST_LINE = 1 << 20  # of rejects.jsonl: bytes


class Span(NamedTuple):
    """A stretch of a row's text: a document's mark, or tokens with, without, or all with a loss."""

    text: str
    style: Literal["mark", "trained", "masked", "plain"]


def read_rejects(directory: Path) -> Counter[tuple[str, str]]:
    """Count refused documents by source and reason.

    Raises:
        DataError: their file is missing, or a line is not what `prepare` writes.
    """
    path = directory / REJECTS_NAME
    if not path.is_file():
        raise DataError(f"{path}: missing; run `headrace verify {directory}`")
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


def count_lengths(directory: Path, manifest: Manifest, progress: Progress = silent) -> Counter[int]:
    """Count the pieces of documents in rows by the bits of their lengths in tokens."""
    counts: Counter[int] = Counter()
    sizes = [shard.bytes for shard in manifest.shards]
    for shard in progress(manifest.shards, sizes, "lengths"):
        for _, rows in row_groups(directory, manifest, shard, ["document_lengths"]):
            lengths = numbers_of(pc.list_flatten(rows["document_lengths"]))
            counts.update(int(length).bit_length() for length in lengths)
    return counts


def rows_of_keys(
    directory: Path, manifest: Manifest, keys: Sequence[int], progress: Progress = silent
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location of each row with one of the keys, and the row.

    Raises:
        DataError: at the end, where no row has one of the keys.
    """
    missing = dict.fromkeys(keys)
    for shard in progress(manifest.shards, [shard.bytes for shard in manifest.shards], "rows"):
        for group, table in row_groups(directory, manifest, shard):
            found = numbers_of(table["row_key"])
            places = np.flatnonzero(np.isin(found, np.array(keys, np.uint64)))
            for index, whole in zip(places.tolist(), table.take(places).to_pylist(), strict=True):
                row = without_runs(whole, manifest)
                missing.pop(row["row_key"], None)
                yield f"{shard.file} row {shard.rows_before(group) + index}", row
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


def row_spans(tokenizer: Tokenizer, row: dict[str, Any]) -> list[Span]:
    """Return one row as text; of a pair first the better side."""
    ids, mask = row["input_ids"], row["loss_mask"]
    rejected = row.get("rejected_input_ids")
    if rejected is None:
        return [*side_spans(tokenizer, ids, mask, row["document_lengths"], "")]
    worse = row["rejected_loss_mask"]
    return [
        *side_spans(tokenizer, ids, mask, [len(ids)], "chosen, "),
        *side_spans(tokenizer, rejected, worse, [len(rejected)], "rejected, "),
    ]


def side_spans(
    tokenizer: Tokenizer, ids: list[int], mask: list[bool] | None, lengths: list[int], label: str
) -> Iterator[Span]:
    """Yield ids as text, with a mark where a document begins."""
    flags = mask or [True] * len(ids)
    trained: Literal["trained", "plain"] = "plain" if mask is None else "trained"
    start = 0
    for length in lengths:
        yield Span(f"┃{label}{length} tokens┃ ", "mark")
        for begin, end in runs(flags, start, start + length):
            part = visible_lines(tokenizer.decode(ids[begin:end], skip_special_tokens=False))
            yield Span(part, trained if flags[begin] else "masked")
        yield Span("\n", "plain")
        start += length


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
