"""The page of a run: right with one step, a hundred thousand, NaN, and no evaluation."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from headrace.jobs import cli
from headrace.jobs.report import page
from headrace.jobs.report.curves import MOST_POINTS, thin
from headrace.jobs.report.run_record import read_run
from headrace.jobs.report.waits import time_shares
from headrace.schemas.errors import DataError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def step(number: int, loss: float, **more: object) -> dict:
    return {
        "kind": "train", "step": number, "loss": loss, "lr": 1e-4, "gradient_norm": 0.5,
        "tokens": 1000, "seconds": 0.5, "data_seconds": 0.01, "tokens_per_second": 2000.0,
        "epoch": number / 10, "memory_gib": 1.5, "fill": 0.9, "trained_share": 1.0,
        "source_losses": {}, "source_tokens": {}, "router_loss": None, "pairs": None,
    } | more  # fmt: skip


def evaluation(number: int, loss: float, name: str = "held out") -> dict:
    return {"kind": "evaluation", "step": number, "name": name, "loss": loss}


def make_run(folder: Path, *lines: dict, tail: str = "") -> Path:
    folder.mkdir(parents=True)
    record = {"config": {"model": "models/tiny", "output_dir": "run"}, "headrace": "0.1.0"}
    (folder / "train.json").write_text(json.dumps(record))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder


class Balanced(HTMLParser):
    """Fails where an element is not closed by its own tag."""

    VOID = frozenset({"meta", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.shown: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.shown.append(data)


def texts(run: Path) -> str:
    return " ".join(" ".join(Balanced(page.render(read_run(run))).shown).split())


def test_it_says_how_the_losses_went(tmp_path):
    lines = [evaluation(0, 2.0), step(1, 1.9), step(2, 1.7), evaluation(2, 1.5)]
    text = texts(make_run(tmp_path / "run", *lines))
    assert "held out 2.0000 1.5000 -25.00 % 1.5000 2" in text
    assert "training loss 1.7000" in text
    assert "tokens per second 2,000" in text
    assert "No evaluation" not in text


def test_a_run_of_one_step_without_evaluations_is_a_page_too(tmp_path):
    text = texts(make_run(tmp_path / "run", step(1, 1.9)))
    assert "No evaluation is written down" in text
    assert "training loss 1.9000" in text


def test_a_run_without_a_step_says_so(tmp_path):
    assert "No step is written down yet." in texts(make_run(tmp_path / "run"))


def test_losses_that_are_not_finite_are_counted_and_left_out_of_curves(tmp_path):
    lines = [step(1, 1.0), step(2, math.nan), step(3, math.inf), step(4, 3.0)]
    run = make_run(tmp_path / "run", *lines, evaluation(4, math.nan))
    text = texts(run)
    assert "The loss of 2 step(s) is NaN or infinite, first of step 2" in text
    curve = thin([(line["step"], line["loss"]) for line in read_run(run).steps])
    assert curve is not None
    assert curve.mean.tolist() == [1.0, 3.0]


def test_a_hundred_thousand_steps_make_a_small_page_that_keeps_every_extreme(tmp_path):
    values = [math.sin(number / 500) for number in range(100_000)]
    values[77_777] = 9.0
    curve = thin(list(enumerate(values)))
    assert curve is not None
    assert len(curve.mean) == MOST_POINTS
    assert curve.high.max() == 9.0
    assert curve.low.min() == min(values)
    run = make_run(tmp_path / "run", *(step(n + 1, value) for n, value in enumerate(values)))
    assert len(page.render(read_run(run))) < 1_500_000


def test_a_line_that_is_being_written_is_no_damage_and_a_damaged_one_is_counted(tmp_path):
    run = make_run(tmp_path / "a", step(1, 1.0), tail='{"kind": "train", "st')
    assert read_run(run).damaged == 0
    run = make_run(tmp_path / "b", step(1, 1.0), tail='{"kind": "train", "st\n')
    assert read_run(run).damaged == 1
    assert "1 line(s) of metrics.jsonl cannot be read" in texts(run)


def test_names_from_outside_are_text_and_not_markup(tmp_path):
    name = "<script>alert(1)</script> $x$"
    mixed = {"source_losses": {name: 1.0, "_b": 2.0}, "source_tokens": {name: 1, "_b": 3}}
    run = make_run(tmp_path / "run", step(1, 1.5, **mixed), evaluation(1, 1.0, name))
    html = page.render(read_run(run))
    assert "<script" not in html
    text = texts(run)
    assert text.count(name) >= 3  # the table and two legends
    assert " _b" in text


def test_nothing_on_the_page_comes_from_elsewhere(tmp_path):
    html = page.render(read_run(make_run(tmp_path / "run", step(1, 1.0))))
    links = re.findall(r'(?:src|href)="([^"#][^"]*)"|url\(([^#)]\S*)\)', html)
    assert links == []


def test_shares_of_time_come_from_the_timelines(tmp_path):
    run = make_run(tmp_path / "run", step(1, 1.0), step(2, 1.0))
    (run / "profile").mkdir()
    spans = [
        {"name": "ForwardPass", "start": 0, "end": 1},
        {"name": "RecvGrad", "start": 1, "end": 1.5},
        {"name": "data", "start": 1.5, "end": 1.6},
    ]
    first = json.dumps({"step": 1, "seconds": 50.0, "spans": []})
    second = json.dumps({"step": 2, "seconds": 2.0, "spans": spans})
    (run / "profile" / "timeline-000.jsonl").write_text(f"{first}\n{second}\n")
    (found,) = time_shares(run)
    assert found.steps == 1
    assert found.shares == pytest.approx({"forward": 0.5, "peers": 0.25, "data": 0.05, "idle": 0.2})
    assert "0 1 50.0 % 5.0 % 25.0 % 20.0 %" in texts(run)


def test_the_command_writes_beside_the_run_and_watches_only_what_changes(tmp_path):
    run = make_run(tmp_path / "run", step(1, 1.0))
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(run)])
    assert stop.value.code == 0
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")

    changes = iter([None, lambda: (run / "metrics.jsonl").write_text("")])

    def pause(seconds: float) -> None:
        change = next(changes)
        if change is not None:
            change()

    pages = page.watch(run, tmp_path / "out.html", 30, pause)
    assert next(pages).read_text(encoding="utf-8").count('http-equiv="refresh" content="30"') == 1
    assert "No step" in next(pages).read_text(encoding="utf-8")  # written anew after one idle look


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"train\.json: not found; give the output_dir"):
        page.write_report(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_real_browser_draws_it(tmp_path):
    lines = [step(n, 2 - n / 100) for n in range(1, 60)]
    path = page.write_report(make_run(tmp_path / "run", *lines, evaluation(59, 1.4)))
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking".split()
    result = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert result.stdout.count("<svg") >= 5
    assert "training loss" in result.stdout
