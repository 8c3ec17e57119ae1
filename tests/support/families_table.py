"""Writes the parity table of docs/families.md: every family, mode and number of stages.

Run it as `make families`; it takes about a minute.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from family_modes import MODES, TOLERANCE
from tiny_families import FAMILIES, save_tiny

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- begin: parity -->\n", "<!-- end: parity -->\n"
STAGES = (1, 2, 3)


def table():
    """Markdown: the largest relative difference of loss or gradients in each cell."""
    columns = [(mode, stages) for mode in MODES for stages in STAGES]
    lines = [
        "| family | " + " | ".join(f"{mode}, {stages}" for mode, stages in columns) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for family in sorted(FAMILIES):
            model = save_tiny(family, Path(folder) / family)
            cells = [max(MODES[mode](model, stages)) for mode, stages in columns]
            assert max(cells) <= TOLERANCE, f"{family}: {cells}"
            lines.append(f"| {family} | " + " | ".join(f"{cell:.0e}" for cell in cells) + " |")
            sys.stderr.write(f"{family}\n")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + table() + END + after)
