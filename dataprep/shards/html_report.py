"""`report.html` in the shard directory: what it holds at a glance, in one file without scripts."""

import base64
import html
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from headrace.dataprep.rows.task_stats import TaskStats
from headrace.dataprep.shards.inspection import Span, read_rows, row_spans
from headrace.schemas.publish import write_atomic
from headrace.schemas.shards.manifest import ImagesRecord, Manifest, SourceRecord

REPORT_NAME = "report.html"
SHOWN_ROWS = 2  # of each split
SHOWN_TOKENS = 400  # of each row
SHOWN_TILES, LARGEST_SHOWN = 8, 1 << 20  # of each row, and bytes of one
BAR_WIDTH, BAR_HEIGHT, LABEL_WIDTH, NUMBER_WIDTH = 420, 18, 180, 130
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .15em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #8884 }
svg { font: 13px system-ui, sans-serif; fill: currentColor } rect { fill: #3b7ea1 }
pre { white-space: pre-wrap; background: #8881; padding: .8em; font-size: 13px }
figure { display: inline-block; margin: .3em } figure img { max-width: 14em; max-height: 14em }
figcaption { font-size: 12px }
.masked { opacity: .45 } .mark { color: #3b7ea1; font-weight: bold }
@media (prefers-color-scheme: dark) { body { background: #16191d; color: #dde } }
"""


def write_report(
    directory: Path, manifest: Manifest, stats: Mapping[str, TaskStats], tokenizer: Tokenizer
) -> None:
    """Write the report of a directory whose shards are complete; equal shards give equal bytes."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8"><title>Headrace shards</title>',
        f"<style>{STYLE}</style>",
        "<h1>Headrace shards</h1>",
        f"<p>{escape(summary(manifest))}</p>",
        section("Sources", sources_table(manifest)),
        section("Tokens by source", bars(source_tokens(manifest))),
        section("Fill of rows by source", bars(fill_bars(manifest))),
        section("Documents by length in tokens", bars(length_bars(stats.values()))),
        section("Tokens by fate", table(("", "tokens"), ledger_rows(manifest))),
        *pictures_section(manifest),
        section("Dropped documents", reasons_table("dropped", dropped(manifest.sources))),
        section("Refused documents", reasons_table("refused", refused(stats))),
        section("Some rows", rows_text(directory, manifest, tokenizer)),
    ]
    write_atomic(directory / REPORT_NAME, "\n".join(parts) + "\n")


def summary(manifest: Manifest) -> str:
    """The directory in one sentence."""
    rows = sum(source.rows for source in manifest.sources)
    tokens = sum(manifest.ledger.tokens_out.values())
    stored = sum(shard.bytes for shard in manifest.shards)
    return (
        f"{tokens:,} tokens in {rows:,} rows of up to {manifest.sequence_len:,} "
        f"({manifest.kind}, packing {manifest.packing}, seed {manifest.seed}), "
        f"{len(manifest.shards)} files of {stored:,} bytes, {stored / tokens:.2f} bytes a token. "
        "In the rows below, ┃ marks where a document begins; what is not trained is dimmed."
    )


def sources_table(manifest: Manifest) -> str:
    """One line for each source."""
    names = ("documents", "refused", "rows", "tokens", "trained", "median length", "longest")
    rows = [
        (
            source.name,
            source.documents,
            source.rejected_documents,
            source.rows,
            source.tokens,
            source.trained_tokens,
            source.document_length_quantiles.get("p50", 0),
            source.document_length_quantiles.get("p100", 0),
        )
        for source in manifest.sources
    ]
    return table(("source", *names), rows)


def source_tokens(manifest: Manifest) -> list[tuple[str, float, str]]:
    """The tokens of each source, also in a mixture."""
    parts = [source.mixed_tokens or {source.name: source.tokens} for source in manifest.sources]
    return [(name, tokens, "") for part in parts for name, tokens in part.items()]


def fill_bars(manifest: Manifest) -> list[tuple[str, float, str]]:
    """The fill of each source's rows."""
    fills = [(source.name, source.fill(manifest.row_tokens)) for source in manifest.sources]
    return [(name, fill, f"{fill:.1%}") for name, fill in fills]


def length_bars(stats: Iterable[TaskStats]) -> list[tuple[str, float, str]]:
    """Documents by length, in powers of two, before packing."""
    counts: Counter[int] = Counter()
    for part in stats:
        for length, count in part.document_lengths.items():
            counts[length.bit_length()] += count
    span = range(min(counts, default=0), max(counts, default=-1) + 1)
    return [(f"{1 << bits - 1:,} to {(1 << bits) - 1:,}", counts[bits], "") for bits in span]


def ledger_rows(manifest: Manifest) -> list[tuple[str, int]]:
    """Return the lines of the token ledger."""
    ledger = manifest.ledger
    return [
        ("in", ledger.tokens_in),
        *((f"out: {split}", tokens) for split, tokens in ledger.tokens_out.items()),
        *((f"dropped: {reason}", tokens) for reason, tokens in ledger.tokens_dropped.items()),
        ("difference", ledger.difference()),
    ]


def picture_rows(images: ImagesRecord) -> list[tuple[str, int]]:
    """Return the lines of the picture ledger."""
    ledger = images.ledger
    return [
        ("in", ledger.pictures_in),
        *((f"out: {split}", count) for split, count in ledger.pictures_out.items()),
        *((f"dropped: {reason}", count) for reason, count in ledger.pictures_dropped.items()),
        ("difference", ledger.difference()),
    ]


def dropped(sources: Iterable[SourceRecord]) -> list[tuple[str, str, int]]:
    """Dropped documents by source and reason."""
    return [
        (source.name, reason, count)
        for source in sources
        for reason, count in source.dropped_documents.items()
    ]


def refused(stats: Mapping[str, TaskStats]) -> list[tuple[str, str, int]]:
    """Refused documents by source and reason."""
    return [
        (name, reason, count)
        for name, part in stats.items()
        for reason, count in part.rejects.items()
    ]


def reasons_table(verb: str, rows: Sequence[tuple[str, str, int]]) -> str:
    """Counts by source and reason."""
    return table(("source", "reason", "documents"), rows) if rows else f"<p>None was {verb}.</p>"


def rows_text(directory: Path, manifest: Manifest, tokenizer: Tokenizer) -> str:
    """The beginnings of the first rows of each split."""
    parts = []
    for split in manifest.ledger.tokens_out:
        for name, row in islice(read_rows(directory, manifest, split), SHOWN_ROWS):
            spans = row_spans(tokenizer, cut_row(row, SHOWN_TOKENS))
            parts.append(f"<h3>{escape(name)}, {escape(row['source'])}</h3>")
            parts.append(f"<pre>{text_html(spans)}</pre>")
            parts += pictures_html(row)
    return "\n".join(parts)


def pictures_section(manifest: Manifest) -> list[str]:
    """The ledger of pictures, where rows have some."""
    if manifest.images is None:
        return []
    rows = picture_rows(manifest.images)
    title = f"Pictures by fate ({escape(manifest.images.family)})"
    return [section(title, table(("", "pictures"), rows))]


def pictures_html(row: dict[str, Any]) -> list[str]:
    """The first tiles of a row, each in the page itself."""
    first = (row.get("images") or [])[:SHOWN_TILES]
    small = [tile for tile in first if len(tile["bytes"]) <= LARGEST_SHOWN]
    return [
        f'<figure><img src="data:{media_type(tile["bytes"])};base64,'
        f'{base64.b64encode(tile["bytes"]).decode()}" alt="picture {tile["picture"]}"><figcaption>'
        f"picture {tile['picture']}: {tile['width']} x {tile['height']}, {tile['tokens']} tokens"
        "</figcaption></figure>"
        for tile in small
    ]


def media_type(content: bytes) -> str:
    """Return the type of a tile's file."""
    if content.startswith(b"RIFF"):
        return "image/webp"
    return "image/jpeg" if content.startswith(b"\xff\xd8") else "image/png"


def cut_row(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The first tokens of a row, of each side."""
    sides = ("input_ids", "loss_mask", "rejected_input_ids", "rejected_loss_mask")
    lengths, left = [], tokens
    for length in row["document_lengths"]:
        if left > 0:
            lengths.append(min(length, left))
            left -= length
    cut = {name: row[name][:tokens] for name in sides if row.get(name) is not None}
    return row | cut | {"document_lengths": lengths}


def text_html(spans: Iterable[Span]) -> str:
    """Return spans as HTML, those that are trained as plain text."""
    return "".join(
        escape(span.text)
        if span.style in ("trained", "plain")
        else f'<span class="{span.style}">{escape(span.text)}</span>'
        for span in spans
        if span.text
    )


def section(title: str, content: str) -> str:
    """A heading and what belongs to it."""
    return f"<h2>{title}</h2>\n{content}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str | int]]) -> str:
    """A table; numbers with thousands separators."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = (
        "<tr>" + "".join(f"<td>{escape(shown(value))}</td>" for value in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>\n" + "\n".join(body) + "</table>"


def bars(values: Iterable[tuple[str, float, str]]) -> str:
    """Horizontal bars as SVG: each has a name, a value, and what to write beside it."""
    values = list(values)
    largest = max((value for _, value, _ in values), default=0) or 1
    width = LABEL_WIDTH + BAR_WIDTH + NUMBER_WIDTH
    lines = [f'<svg width="{width}" height="{BAR_HEIGHT * len(values)}" role="img">']
    for place, (name, value, label) in enumerate(values):
        top, length = place * BAR_HEIGHT, math.ceil(BAR_WIDTH * value / largest)
        middle = top + BAR_HEIGHT - 5
        label = label or f"{value:,}"
        lines.append(
            f'<text x="{LABEL_WIDTH - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{LABEL_WIDTH}" y="{top + 2}" width="{length}" height="{BAR_HEIGHT - 4}"/>'
            f'<text x="{LABEL_WIDTH + length + 6}" y="{middle}">{escape(label)}</text>'
        )
    return "\n".join([*lines, "</svg>"])


def shown(value: str | int) -> str:
    """A cell of a table."""
    return value if isinstance(value, str) else f"{value:,}"


def escape(text: str) -> str:
    """Text that cannot be taken for markup, without characters that HTML forbids."""
    visible = "".join("\ufffd" if ord(c) < 32 and c not in "\n\t" else c for c in text)
    return html.escape(visible)
