"""A run tells at its end what was lost, and its tables what is trained."""

import contextlib
import io
import json
import logging
import re

import pytest
from rich.console import Console
from tokenizers import Regex, Tokenizer, pre_tokenizers

from headrace.dataprep.prepare import prepare
from headrace.jobs import cli
from headrace.jobs.console.inspection import inspect
from headrace.jobs.console.reporter import ConsoleReporter
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.prepare_config import PrepareConfig

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
QUESTION = {"role": "user", "content": "water"}


@pytest.fixture
def chats(tmp_path, monkeypatch, tokenizer_folder):
    """Prepare rows of messages, and return what stands in the terminal."""
    monkeypatch.chdir(tmp_path)

    def prepare_rows(rows, workers=1, **chat):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"name": "talk", "type": "chat", "path": "in.jsonl", "chat": chat}
        source["chat"]["template"] = TEMPLATE
        values = {"output": "out", "tokenizer": str(tokenizer_folder), "sources": [source]}
        console = Console(file=io.StringIO(), width=200, markup=False)
        config = PrepareConfig.model_validate(values | {"evaluation_fraction": 0.0})
        manifest = prepare(config, workers, ConsoleReporter(console))
        return manifest, console.file.getvalue()

    return prepare_rows


@pytest.mark.parametrize("workers", [1, 2])
def test_turns_without_an_end_are_told_once(workers, chats, caplog):
    rows = [{"messages": [QUESTION, {"role": "assistant", "content": f"mill {n}"}]} for n in (1, 2)]
    with caplog.at_level(logging.WARNING, "headrace"):
        chats(rows, workers)
        chats(rows, workers)  # reused: the same
    line = 'source "talk": trained turns that end without a token that ends them: 2'
    assert caplog.messages == [line, line]


def test_the_closing_table_has_the_share_that_is_trained(chats):
    rows = [{"messages": [QUESTION, {"role": "assistant", "content": "mill"}]}]
    manifest, shown = chats(rows)
    (source,) = manifest.sources
    lines = [line.split() for line in shown.splitlines() if "trained" in line or "talk" in line]
    header, row = ([cell for cell in line if cell not in "│┃"] for line in lines)
    share = f"{source.trained_tokens / source.tokens:.1%}"
    assert 0 < source.trained_tokens < source.tokens
    assert row[header.index("trained")] == share


@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_that_exhausts_the_tokenizer_s_expression_is_refused_alone(
    workers, tmp_path, monkeypatch, tokenizer_folder
):
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    exhausting = pre_tokenizers.Split(Regex(r"(x+x+)+y"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [exhausting, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save("tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    texts = ["water wheel", "x" * 32, "mill race"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    source = {"name": "a", "type": "documents", "path": "in.jsonl"}
    values = {"output": "out", "tokenizer": ".", "sources": [source], "max_reject_fraction": 0.5}
    config = PrepareConfig.model_validate(values | {"evaluation_fraction": 0.0})
    manifest = prepare(config, workers)
    assert manifest.sources[0].documents == 2
    assert manifest.sources[0].rejected_documents == 1
    reject = json.loads((tmp_path / "out/rejects/rejects.jsonl").read_text())
    assert (reject["line"], reject["reason"]) == (2, "cannot be tokenized")
    assert "retry-limit-in-match over" in reject["detail"]


def test_a_dry_run_shows_what_is_trained_refused_and_lost(tmp_path, monkeypatch, tokenizer_folder):
    monkeypatch.chdir(tmp_path)
    answer = {"role": "assistant", "content": "mill [b]wheel"}
    calls = {"role": "assistant", "content": "race", "tool_calls": [{"function": {"name": "f"}}]}
    rows = [{"messages": [QUESTION, answer]}, {"messages": [QUESTION, calls]}, {"messages": 7}]
    rows += [{"messages": [QUESTION]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    (tmp_path / "p.toml").write_text(
        f'output = "out"\ntokenizer = "{tokenizer_folder}"\n[[sources]]\nname = "talk"\n'
        'type = "chat"\npath = "in.jsonl"\n[sources.chat]\ntemplate = "t.jinja"\n'
    )
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        cli.main(["prepare", "p.toml", "--dry-run", "--workers", "1", "--rows", "2"])
    shown = output.getvalue()
    assert 'source "talk": refused: not a conversation: 1 of 4 (first: in.jsonl:3: field' in shown
    assert 'source "talk": dropped: nothing in it is trained: 1 of 4' in shown
    assert 'source "talk": tool_calls that the chat template does not write: 1 in 3' in shown
    assert "trained turns that end without a token that ends them: 2 in 3 documents" in shown
    assert shown.count("tool_calls that") == 1
    assert "fill of rows" in shown
    assert re.search(r"trained tokens .*\(\d+\.\d%\)", shown)
    assert "a row of talk" in shown
    assert "⟦mill [b]wheel" in shown.replace("⟦ ", "⟦")
    assert not (tmp_path / "out").exists()


def test_inspect_tells_what_the_template_left_out(chats, tmp_path):
    calls = {"role": "assistant", "content": "race", "tool_calls": [{"function": {"name": "f"}}]}
    chats([{"messages": [QUESTION, calls]}])
    console = Console(file=io.StringIO(), width=200)
    inspect(tmp_path / "out", 1, console)
    shown = console.file.getvalue()
    assert 'source "talk": tool_calls that the chat template does not write: 1' in shown
    assert "⟦" in shown


def test_a_misspelt_role_is_named_with_the_nearest_where_it_drops_all_rows(chats):
    answer = {"role": "assistant", "content": "mill"}
    with pytest.raises(DataError, match="nothing in it is trained: 2") as raised:
        chats([{"messages": [QUESTION, answer]}] * 2, train_on=["asistant"])
    assert 'train_on names "asistant" (did you mean "assistant"?)' in str(raised.value)


def test_a_misspelt_role_is_named_where_rows_are_left(chats, caplog):
    answer = {"role": "miller", "content": "mill"}
    chats([{"messages": [QUESTION, answer]}], train_on=["mller", "user"], roles={"m": "miller"})
    assert 'train_on names "mller" (did you mean "miller"?), a role that none' in caplog.text
