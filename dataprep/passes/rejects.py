"""Documents that were refused: one file of them all, and the limits of what a run bears."""

import json
import shutil

from headrace.dataprep.rows.task_stats import TaskStats, add_stats
from headrace.dataprep.text.chat_losses import absent_roles
from headrace.dataprep.work.context import Context
from headrace.dataprep.work.workspace import REJECTS_NAME, rejects_path
from headrace.schemas.errors import DataError
from headrace.schemas.outside_text import visible
from headrace.schemas.publish import open_atomic

SHOWN_REJECTS = 3


def collect_rejects(context: Context, tasks: int) -> None:
    """One file of all refused documents, in input order."""
    path = context.output / REJECTS_NAME
    path.parent.mkdir(exist_ok=True)
    with open_atomic(path) as target:
        for task in range(tasks):
            with rejects_path(context.output, task).open("rb") as source:
                shutil.copyfileobj(source, target)


def check_rejects(context: Context, by_source: dict[str, TaskStats]) -> None:
    """Stop when more documents were refused than the config allows, showing the first."""
    total = add_stats(by_source.values())
    documents = total.documents + total.rejected
    allowed = context.config.max_reject_fraction
    if total.rejected <= allowed * documents:
        return
    path = context.output / REJECTS_NAME
    with path.open(encoding="utf-8") as lines:
        first = [json.loads(line) for line, _ in zip(lines, range(SHOWN_REJECTS), strict=False)]
    shown = "; ".join(f"{r['file']}:{r['line']}: {r['reason']}: {r['detail']}" for r in first)
    raise DataError(
        f"{total.rejected} of {documents} documents refused, more than max_reject_fraction = "
        f"{allowed:g} allows: {shown}; all are in {path}; repair them, or raise max_reject_fraction"
    )


def check_sources(context: Context, by_source: dict[str, TaskStats]) -> None:
    """Each source must have given a document, and kept one."""
    for source in context.config.sources:
        stats = by_source[source.name]
        if not stats.documents and stats.rejected:
            raise DataError(
                f'source "{source.name}": all {stats.rejected} documents of {source.path} are '
                f"refused ({named_counts(stats.rejects)}); see {context.output / REJECTS_NAME}; "
                "repair them, set the fields of the source, or remove it"
            )
        if not stats.documents:
            raise DataError(
                f'source "{source.name}": no documents in {source.path}; '
                "correct the path, or remove the source"
            )
        if not stats.kept:
            absent = absent_roles(stats.notes, stats.documents)
            why = "; ".join([named_counts(stats.documents_dropped), *map(visible, absent)])
            raise DataError(
                f'source "{source.name}": none of its {stats.documents} documents is left '
                f"({why}); change what drops them, or remove "
                "the source"
            )


def named_counts(counts: dict[str, int]) -> str:
    """Reasons with their numbers, the largest first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name}: {count}" for name, count in ordered)
