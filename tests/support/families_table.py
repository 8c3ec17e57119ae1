"""Writes the tables of docs/families.md: what becomes of each model type of transformers, and the
parity of every family with a record, mode and number of stages.

Run it as `make families`; it takes some minutes. `--types` leaves parity out; `--types a,b` looks
at these types alone and keeps what the page says of the others.
"""

import re
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from family_modes import MODES, TOLERANCE
from model_types import TYPES, outcome
from tiny_families import FAMILIES, save_tiny

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- begin: parity -->\n", "<!-- end: parity -->\n"
TYPES_BEGIN, TYPES_END = "<!-- begin: types -->\n", "<!-- end: types -->\n"
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


def types_on_page():
    """Type -> difference or reason, as the page has them."""
    text = PAGE.read_text().partition(TYPES_BEGIN)[2].partition(TYPES_END)[0]
    equal, _, refused = text.partition("\n\n")
    found = {name: float(value) for name, value in re.findall(r"`([\w-]+)` ([\d.e+-]+\d)", equal)}
    for line in refused.splitlines()[2:]:
        reason, _, names = line.removeprefix("| ").removesuffix(" |").rpartition(" | ")
        found |= dict.fromkeys(re.findall(r"`([\w-]+)`", names), reason)
    return found


def types_table(chosen):
    """Markdown: the types that equal transformers, and the reasons why the others are refused."""
    known = types_on_page() if chosen else {}
    for model_type in chosen or TYPES:
        known[model_type] = outcome(model_type)
        sys.stderr.write(f"{model_type}: {known[model_type]}\n")
    found = {model_type: known[model_type] for model_type in TYPES}
    equal = {name: value for name, value in found.items() if isinstance(value, float)}
    lines = [
        f"Equal, with the largest relative difference ({len(equal)} of {len(found)}): "
        + ", ".join(f"`{name}` {value:.0e}" for name, value in equal.items())
        + ".",
        "",
        "| refused because | types |",
        "| --- | --- |",
    ]
    by_reason = {}
    for name, value in found.items():
        if name not in equal:
            by_reason.setdefault(value, []).append(f"`{name}`")
    lines += [f"| {reason} | {', '.join(names)} |" for reason, names in sorted(by_reason.items())]
    return "\n".join(lines) + "\n"


def put(begin, end, text):
    """Replace what the page has between two marks."""
    before, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(before + begin + text + end + rest.partition(end)[2])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    options = sys.argv[1:]
    if "--types" not in options:
        put(BEGIN, END, table())
    put(TYPES_BEGIN, TYPES_END, types_table(options[1].split(",") if options[1:] else []))
