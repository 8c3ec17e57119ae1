"""Shares of its time that each process spent on what, from the timelines of `profile.timeline`."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.schemas.errors import DataError

PATTERN = "timeline-*.jsonl"
FOLDER = "profile"
PARTS = {
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "OptimizerStep": "optimizer",
    "data": "data",
    "LoadMicroBatch": "data",
    "answers": "answers",
    "RecvActivation": "peers",
    "RecvGrad": "peers",
    "SendActivation": "peers",
    "SendGrad": "peers",
}


@dataclass(frozen=True)
class ProcessShares:
    """Shares of a process's time over its recorded steps; `idle` is what no part accounts for."""

    rank: int
    steps: int
    shares: dict[str, float]


def read_timelines(run_directory: Path) -> list[list[dict[str, Any]]]:
    """Return [rank][step] with the spans of each.

    Raises:
        DataError: the run recorded none.
    """
    files = sorted((run_directory / FOLDER).glob(PATTERN))
    if not files:
        raise DataError(
            f"{run_directory}: no {FOLDER}/{PATTERN}; train with profile.timeline = true"
        )
    return [
        [
            json.loads(line)
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
            if line.endswith("\n")
        ]
        for path in files
    ]


def time_shares(run_directory: Path) -> list[ProcessShares]:
    """Return the shares of each process; none where nothing was recorded.

    The first step is left out where there are others.
    """
    found: list[ProcessShares] = []
    if not any((run_directory / FOLDER).glob(PATTERN)):
        return found
    for rank, steps in enumerate(read_timelines(run_directory)):
        kept = steps[1:] or steps
        total = sum(line["seconds"] for line in kept)
        if total:
            found.append(ProcessShares(rank, len(kept), shares(kept, total)))
    return found


def shares(steps: list[dict[str, Any]], total: float) -> dict[str, float]:
    """Return each part's share of the steps' seconds."""
    seconds: Counter[str] = Counter()
    for line in steps:
        for span in line["spans"]:
            if span["name"] in PARTS:
                seconds[PARTS[span["name"]]] += span["end"] - span["start"]
    return {
        **{part: seconds[part] / total for part in dict.fromkeys(PARTS.values()) if seconds[part]},
        "idle": max(0.0, 1 - seconds.total() / total),
    }
