"""What is seen of a run: the bar meanwhile, the report afterwards, and an estimate before."""

import contextlib
import functools
import gzip
import html.parser
import io
import json
import random
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from headrace.dataprep.dry_run import Sampling, estimate
from headrace.dataprep.input.pieces import Task
from headrace.dataprep.passes import task_runner
from headrace.dataprep.prepare import prepare
from headrace.dataprep.work.budgets import Budgets
from headrace.dataprep.work.task_progress import TaskBar, write_note
from headrace.dataprep.work.workspace import Workspace
from headrace.jobs import cli
from headrace.jobs.console.estimate import print_estimate
from headrace.jobs.console.inspection import inspect

WORDS = "water wheel mill race stone grain flour river gate sluice timber axle gear".split()


def words(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def write_lines(path, seed, count, longest=60, compressed=False):
    rng = random.Random(seed)
    lines = [json.dumps({"text": words(rng, rng.randrange(1, longest))}) for _ in range(count)]
    data = ("\n".join(lines) + "\n").encode()
    Path(path).write_bytes(gzip.compress(data) if compressed else data)


@pytest.fixture
def make_config(make_config):
    """Few blocks and large row groups."""
    return functools.partial(make_config, block_bytes=1 << 16, row_group_tokens=1 << 20)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Lines, compressed lines, small files, and text with separators; some are refused."""
    monkeypatch.chdir(tmp_path)
    write_lines("lines.jsonl", 1, 4000)
    with Path("lines.jsonl").open("a") as file:
        file.write('{"text": 3}\n{"text": ""}\n' * 100)
    write_lines("packed.jsonl.gz", 2, 3000, compressed=True)
    Path("files").mkdir()
    rng = random.Random(3)
    for number in range(200):
        Path(f"files/{number:03d}.txt").write_text(words(rng, rng.randrange(1, 600)))
    Path("parts.txt").write_text("====".join(words(rng, rng.randrange(1, 90)) for _ in range(2000)))
    return [
        {"name": "lines", "type": "documents", "path": "lines.jsonl"},
        {"name": "packed", "type": "documents", "path": "packed.jsonl.gz"},
        {"name": "files", "type": "text", "path": "files/*.txt"},
        {"name": "parts", "type": "text", "path": "parts.txt", "document_separator": "===="},
    ]


def test_an_estimate_is_near_what_the_run_gives(sources, make_config, run):
    config = make_config(sources=sources, max_reject_fraction=0.1)
    found = estimate(config, 1, Sampling(least_bytes=1 << 16, least_sample_bytes=1 << 14))
    assert not Path("out").exists()
    assert found.sampled_bytes < 0.5 * found.input_bytes
    manifest = run(config)
    actual = {
        "documents": sum(source.documents for source in manifest.sources),
        "tokens": manifest.ledger.tokens_in,
        "rows": sum(source.rows for source in manifest.sources),
        "stored_bytes": sum(shard.bytes for shard in manifest.shards),
    }
    errors = {name: getattr(found, name) / value - 1 for name, value in actual.items()}
    assert abs(errors.pop("stored_bytes")) < 0.3  # small samples are compressed less
    assert max(abs(error) for error in errors.values()) < 0.1, errors
    refused = sum(source.rejected_documents for source in manifest.sources)
    assert refused == 200
    assert found.refused < 3 * refused


def test_an_estimate_of_a_small_corpus_is_exact(sources, make_config, run):
    config = make_config(sources=sources, max_reject_fraction=0.1)
    found = estimate(config, 1)
    manifest = run(config)
    assert found.sampled_bytes == found.input_bytes
    assert found.documents == sum(source.documents for source in manifest.sources)
    assert found.tokens == sum(manifest.ledger.tokens_out.values())
    assert found.rows == sum(source.rows for source in manifest.sources)
    assert found.refused == 200
    limited = estimate(config.model_copy(update={"max_rows": int(found.rows) // 2}), 1)
    assert limited.rows == int(found.rows) // 2
    assert limited.stored_bytes == pytest.approx(found.stored_bytes * limited.rows / found.rows)
    assert limited.documents == found.documents


def test_the_command_prints_an_estimate_and_writes_nothing(
    corpus, make_config, capsys, tokenizer_folder
):
    Path("prepare.toml").write_text(
        f'output = "out"\ntokenizer = "{tokenizer_folder}"\n[deduplicate]\nexact = true\n'
        '[[sources]]\nname = "mill"\ntype = "text"\npath = "corpus/*.txt"\n'
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["prepare", "prepare.toml", "--dry-run"])
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert shown.startswith("estimate from 100.0% of 0.1 MB of input")
    assert re.search(r"documents\s+│\s+200 ", shown)
    assert "duplicates are counted as if they stayed" in shown
    assert not Path("out").exists()


def test_an_estimate_says_hours_where_there_are_hours(corpus, make_config):
    console = Console(file=io.StringIO(), width=80)
    found = estimate(make_config(), 1)
    for seconds, words in ((90, "90.0 seconds"), (1800, "30.0 minutes"), (9000, "2.5 hours")):
        print_estimate(replace(found, seconds=seconds), make_config(), console)
        assert words in console.file.getvalue()


class Recorder:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.told, self.seen = [], {}

    @contextlib.contextmanager
    def bar(self, title, total):
        self.told.append(f"bar {title}")
        yield self.seen.setdefault(title, RecordedBar())

    def finished(self, manifest):
        self.told.append(manifest)


class RecordedBar(list):
    def update(self, done, counts=""):
        self.append((done, counts))


def test_the_bar_moves_while_a_task_runs(tmp_path, make_config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines("one.jsonl.gz", 1, 3000, compressed=True)  # one task of many blocks
    source = {"name": "one", "type": "documents", "path": "one.jsonl.gz"}
    reporter = Recorder()

    def process_slowly(*arguments):
        time.sleep(0.01)
        return process_block(*arguments)

    process_block = task_runner.process_block
    monkeypatch.setattr(task_runner, "process_block", process_slowly)
    config, often = make_config(sources=[source], block_bytes=1 << 13), Budgets(poll_seconds=0.005)
    manifest = prepare(config, 1, reporter, budgets=often)
    assert reporter.told == ["bar tokenize", "bar shuffle ", manifest]
    seen = reporter.seen["tokenize"]
    size = Path("one.jsonl.gz").stat().st_size
    amounts = [amount for amount, _ in seen]
    assert amounts == sorted(amounts)
    assert len({amount for amount in amounts if 0 < amount < size}) > 3
    assert seen[-1] == (size, f"3,000 documents, {manifest.ledger.tokens_in:,} tokens")


def test_notes_of_a_killed_run_are_not_counted(tmp_path):
    space = Workspace(tmp_path)
    (tmp_path / ".work").mkdir()
    space.open()
    write_note(space, 0, 5, 50)
    task = Task(0, 0, None, ())
    reporter = Recorder()
    with TaskBar(reporter, "tokenize", space, [task]) as bar:
        bar.show()
        assert reporter.seen["tokenize"][-1][1] == "0 documents, 0 tokens"
        write_note(space, 0, 2, 7)
        bar.show()
        assert reporter.seen["tokenize"][-1][1] == "2 documents, 7 tokens"
    assert threading.active_count() < 50


class Outline(html.parser.HTMLParser):
    """Whether tags are balanced, and the text under each heading."""

    def __init__(self):
        super().__init__()
        self.open, self.sections, self.dimmed = [], {}, []

    def handle_starttag(self, tag, attributes):
        assert tag != "script"
        assert not {"src", "href"} & {name for name, _ in attributes}
        if tag not in ("meta", "html"):
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag != "html":
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag == "h2":
            self.sections[data] = ""
        elif self.sections:
            self.sections[list(self.sections)[-1]] += data + " "
        if attributes.get("class") == "masked":
            self.dimmed.append(data)


def test_the_report_shows_what_the_directory_holds(sources, make_config, run):
    filters = {"min_characters": 20}
    manifest = run(make_config(sources=sources, max_reject_fraction=0.1, filters=filters))
    outline = Outline()
    outline.feed(Path("out/report.html").read_text())
    assert outline.open == []
    sections = {name: " ".join(text.split()) for name, text in outline.sections.items()}
    for source in manifest.sources:
        assert f"{source.name} {source.tokens:,}" in sections["Tokens by source"]
        assert f"{source.fill(64):.1%}" in sections["Fill of rows by source"]
    assert f"in {manifest.ledger.tokens_in:,}" in sections["Tokens by fate"]
    assert "difference 0" in sections["Tokens by fate"]
    count = manifest.sources[0].dropped_documents["filter min_characters"]
    assert f"lines filter min_characters {count:,}" in sections["Dropped documents"]
    assert "lines not a string 100" in sections["Refused documents"]
    lengths = re.findall(r"\d to \S+ ([\d,]+)", sections["Documents by length in tokens"])
    kept = sum(s.documents - sum(s.dropped_documents.values()) for s in manifest.sources)
    assert sum(int(number.replace(",", "")) for number in lengths) == kept
    assert "tokens┃" in sections["Some rows"]
    console = Console(file=io.StringIO(), width=200)
    inspect(Path("out"), 0, console)
    assert "refused in lines: not a string: 100 documents" in console.file.getvalue()


def test_the_report_dims_what_is_not_trained(tmp_path, monkeypatch, make_config, run):
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": "mill & <b>?"}, {"role": "assistant", "content": "flour"}]
    Path("chat.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 20)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    source = {"name": "talk", "type": "chat", "path": "chat.jsonl", "chat": {"template": template}}
    run(make_config(sources=[source], evaluation_fraction=0))
    outline = Outline()
    outline.feed(Path("out/report.html").read_text())
    assert any("user: mill & <b>?" in text for text in outline.dimmed)
    assert not any("flour" in text for text in outline.dimmed)
    assert "flour" in outline.sections["Some rows"]
