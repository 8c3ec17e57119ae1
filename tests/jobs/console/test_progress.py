"""Long work shows a bar with its rate and the time left, on a terminal."""

import io

import pytest
from rich.console import Console

from headrace.jobs.console.progress import tracked


def drawn(unit, terminal=True):
    """What is drawn while three items of 5 MB, or 5 units, pass."""
    now = iter(range(1000))
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    console.get_time = lambda: float(next(now))
    size = 5 if unit else 5_000_000
    assert list(tracked("abc", [size] * 3, "merge", unit, console)) == ["a", "b", "c"]
    return console.file.getvalue()


@pytest.mark.parametrize(("unit", "rate"), [(None, " MB/s"), ("answers", " answers/s")])
def test_a_bar_has_rate_and_time_left(unit, rate):
    shown = drawn(unit)
    assert "merge" in shown
    assert rate in shown
    assert "0:00:0" in shown


def test_nothing_is_drawn_into_a_file():
    assert drawn(None, terminal=False) == ""
