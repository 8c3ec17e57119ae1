"""Tables of a shard directory on the terminal: sources, ledgers."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.dataprep.rows.task_stats import add_counts
from headrace.dataprep.shards.html_report import picture_rows
from headrace.schemas.outside_text import visible
from headrace.schemas.shards.manifest import ImagesRecord, Manifest


def print_ledger(console: Console, manifest: Manifest) -> None:
    """The sources, and below them where every token went."""
    table = Table(title="sources", title_justify="left")
    table.add_column("source")
    for name in ("documents", "refused", "rows", "tokens", "trained", "median length", "fill"):
        table.add_column(name, justify="right")
    for source in manifest.sources:
        median = source.document_length_quantiles.get("p50", 0)
        counts = (source.documents, source.rejected_documents, source.rows, source.tokens)
        trained = f"{source.trained_tokens / source.tokens:.1%}" if source.tokens else ""
        fill = f"{source.fill(manifest.row_tokens):.1%}"
        shown = [f"{count:,}" for count in counts]
        table.add_row(plain(source.name), *shown, trained, f"{median:,}", fill)
        for name, tokens in source.mixed_tokens.items():
            table.add_row(plain(f"  {name}"), "", "", "", f"{tokens:,}", "", "", "")
    console.print(table)
    console.print(ledger_table(manifest))
    if manifest.images is not None:
        console.print(picture_table(manifest.images))


def plain(text: str) -> Text:
    """Return text of a file, which may have brackets and control characters, as a cell."""
    return Text(visible(text))


def picture_table(images: ImagesRecord) -> Table:
    """Pictures in, out by split, dropped by reason, the difference."""
    table = Table(title=f"pictures, for {images.family}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in picture_rows(images):
        table.add_row(plain(name), f"{count:,}")
    return table


def ledger_table(manifest: Manifest) -> Table:
    """Tokens in, tokens out by split, tokens and documents dropped by reason, the difference."""
    table = Table(title="token ledger", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    ledger = manifest.ledger
    table.add_row("in", f"{ledger.tokens_in:,}")
    for split, tokens in ledger.tokens_out.items():
        table.add_row(plain(f"out: {split}"), f"{tokens:,}")
    documents = add_counts(source.dropped_documents for source in manifest.sources)
    for reason, tokens in ledger.tokens_dropped.items():
        whole = f" ({documents[reason]:,} documents)" if reason in documents else ""
        table.add_row(plain(f"dropped: {reason}{whole}"), f"{tokens:,}")
    table.add_row("difference", f"{ledger.difference():,}")
    return table
