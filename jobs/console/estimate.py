"""Output of `headrace prepare --dry-run`: an estimate, findings, and rows."""

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from headrace.dataprep.shards.findings import Estimate, Findings, finding_lines
from headrace.jobs.console.inspection import row_text
from headrace.schemas.outside_text import visible
from headrace.schemas.prepare.prepare_config import PrepareConfig

SHOWN_CHARACTERS = 4000  # of a row


def print_estimate(found: Estimate, config: PrepareConfig, console: Console) -> None:
    """Print the estimate as a table."""
    share = found.sampled_bytes / max(1, found.input_bytes)
    title = f"estimate from {share:.1%} of {found.input_bytes / 1e6:,.1f} MB of input"
    console.print(title, highlight=False, soft_wrap=True)
    row_tokens = config.sequence_len * (2 if config.kind == "preference" else 1)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("documents", f"{found.documents:,.0f}"),
        ("refused", f"{found.refused:,.0f}"),
        ("rows", f"{found.rows:,.0f}"),
        ("tokens", f"{found.tokens:,.0f}"),
        ("trained tokens", f"{found.trained:,.0f} ({found.trained / (found.tokens or 1):.1%})"),
        ("fill of rows", f"{found.tokens / (row_tokens * found.rows or 1):.1%}"),
        ("time", show_time(found.seconds)),
        ("shards", f"{found.stored_bytes / 1e6:,.1f} MB"),
        ("needed meanwhile", f"{found.work_bytes / 1e6:,.1f} MB more"),
    ):
        table.add_row(name, value)
    console.print(table)
    if config.deduplicate.enabled:
        console.print("duplicates are counted as if they stayed: a sample does not show them")


def show_time(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, else hours."""
    for size, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:,.1f} seconds"


def print_findings(
    found: dict[str, Findings], tokenizer: Tokenizer, rows: int, console: Console
) -> None:
    """Print the findings of each source, and its first rows with what is trained marked."""
    for name, findings in found.items():
        for line in finding_lines(name, findings):
            console.print(Text(visible(line)), soft_wrap=True)
        for row in findings.first_rows(rows):
            console.rule(Text(visible(f"a row of {name}")))
            text = row_text(tokenizer, row, console)
            more = len(text) > SHOWN_CHARACTERS
            console.print(text[:SHOWN_CHARACTERS] + (" ..." if more else ""), soft_wrap=True)
