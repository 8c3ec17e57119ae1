"""Each bug of the systems before has a row in docs/known-bugs.md, and a test that exists."""

import ast
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "known-bugs.md").read_text(encoding="utf-8")
HEADING = re.compile(r"^## (.+): (\d+) bugs\n", re.MULTILINE)
PARTS = HEADING.split(PAGE)[1:]
SECTIONS = list(zip(PARTS[0::3], PARTS[1::3], PARTS[2::3], strict=True))
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
ROW = re.compile(r"^\| (\d+)([a-z]?) \| (.+) \| (.+) \| (.+) \|$")


def rows(section):
    """Cells of the rows below the head of a section's table."""
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [ROW.match(line) for line in lines[2:]]


@cache
def names_in(file):
    """Names of the tests in a file, as they stand in its source."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("system", "count", "section"), SECTIONS, ids=[s[0] for s in SECTIONS])
def test_every_number_has_a_row_of_what_was_and_what_is(system, count, section):
    found = rows(section)
    assert all(found), f"{system}: a row that is none"
    numbers = [int(row[1]) for row in found]
    assert list(dict.fromkeys(numbers)) == list(range(1, int(count) + 1))
    for row, following in pairwise(found):
        if following[2] > "a":
            assert (following[1], ord(following[2])) == (row[1], ord(row[2]) + 1)


@pytest.mark.parametrize(("system", "count", "section"), SECTIONS, ids=[s[0] for s in SECTIONS])
def test_every_row_names_tests_that_exist(system, count, section):
    for row in rows(section):
        named = TEST.findall(row[5])
        assert named, f"{system} {row[1]}{row[2]}: no test"
        assert ", ".join(f"`{file}::{name}`" for file, name in named) == row[5]
        for file, name in named:
            assert name in names_in(file), f"{system} {row[1]}{row[2]}: {file}::{name}"


def test_all_systems_are_there():
    assert [name for name, _, _ in SECTIONS] == [
        "qlora-pipe",
        "qlora-pipe-lite",
        "Both of them",
        "jllm",
        "fsdp_qlora",
        "Axolotl",
    ]
