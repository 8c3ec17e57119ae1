"""Documents that share runs of words with evaluation sets are dropped, named and counted."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.dataprep.rows.contamination import runs_of, texts_of
from headrace.dataprep.shards.verify import verify
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.prepare.prepare_config import PrepareConfig

QUESTION = "Twelve stones turn the old water mill at night while grain and flour wait below."
WIDE = {"sequence_len": 1 << 12, "evaluation_fraction": 0.0, "packing": "none"}
KEPT = [f"the miller counts sack number {number} and goes on" for number in range(20)]
SHARED = [
    f"Before. {QUESTION} After.",
    "x " + QUESTION.upper().replace(" ", "  \n"),
    QUESTION.replace("stones", "stones,").replace("mill", "“mill”"),
]
PART = " ".join(QUESTION.split()[:12])  # one word less than a run


def write(path, texts):
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def documents(corpus):
    write("in.jsonl", [*KEPT[:10], *SHARED, *KEPT[10:], PART])
    write("test.jsonl", [QUESTION, "short"])
    return [{"name": "a", "type": "documents", "path": "in.jsonl"}]


def test_documents_that_hold_a_test_question_are_dropped_and_counted(
    documents, make_config, run, documents_of, snapshot, caplog
):
    changes = {"sources": documents, "decontaminate": {"paths": ["test.jsonl"]}, **WIDE}
    manifest = run(make_config(**changes))
    assert documents_of("out") == sorted([*KEPT, PART])
    (source,) = manifest.sources
    assert source.dropped_documents == {"shares 13 words with test.jsonl": len(SHARED)}
    assert manifest.ledger.tokens_dropped["shares 13 words with test.jsonl"] > 0
    assert manifest.ledger.difference() == 0
    assert not verify(Path("out"))
    assert "1 texts of the sets have fewer than 13 words" in caplog.text
    run(make_config("two", **changes), workers=2)
    assert snapshot("two") == snapshot("out")


def test_another_content_of_the_sets_is_another_config(documents, make_config, run):
    config = make_config(sources=documents, decontaminate={"paths": ["test.jsonl"]}, **WIDE)
    run(config)
    write("test.jsonl", [KEPT[0] * 2])
    with pytest.raises(DataError, match=r"finished with another config \(other: decont.*sha256"):
        run(config)
    sha256 = json.loads(Path("out/prepare.json").read_text())["config"]["decontaminate"]["sha256"]
    pinned = {"paths": ["test.jsonl"], "sha256": sha256}
    with pytest.raises(DataError, match=r"^decontaminate: test\.jsonl: other texts than sha256"):
        run(make_config("new", sources=documents, decontaminate=pinned, **WIDE))


@pytest.mark.parametrize("kind", ["parquet", "json", "csv", "txt"])
def test_sets_may_be_files_of_any_kind_and_of_chosen_fields(kind, documents, make_config, run):
    rows = [{"id": KEPT[0] * 3, "question": QUESTION}]
    path = f"set.{kind}"
    match kind:
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case "json":
            Path(path).write_text(json.dumps({"data": rows}, indent=1))
        case "csv":
            Path(path).write_text(f'id;question\n"{rows[0]["id"]}";{QUESTION}\n')
        case "txt":
            Path(path).write_text(QUESTION)
    fields = [] if kind == "txt" else ["question"]
    sets = {"paths": [path], "fields": fields}
    manifest = run(make_config(sources=documents, decontaminate=sets, **WIDE))
    assert manifest.sources[0].dropped_documents == {f"shares 13 words with {path}": 3}


def test_conversations_are_looked_at_turn_by_turn():
    content = json.dumps([[{"content": "a\nb c d e", "role": "user"}], [None], None])
    wanted = runs_of("b c d e", 4)[0]
    assert any(wanted in runs_of(text, 4) for text in texts_of(content))


def test_a_character_of_a_text_without_spaces_is_a_word():
    assert len(runs_of("水車が石を回す", 5)) == 3
    assert runs_of("水車が石を", 5)[0] == runs_of("水車が石を回す", 5)[0]
    assert len(runs_of("one two", 5)) == 0


def test_what_cannot_be_looked_for_is_refused(documents, make_config, run):
    sets = {"paths": ["test.jsonl"], "fields": ["none"]}
    with pytest.raises(DataError, match=r"^decontaminate: no text of test\.jsonl has 13 words"):
        run(make_config(sources=documents, decontaminate=sets))
    with pytest.raises(DataError, match=r'^source "decontaminate": no file matches x\.jsonl'):
        run(make_config(sources=documents, decontaminate={"paths": ["x.jsonl"]}))
    ids = [{"name": "a", "type": "pretokenized", "path": "in.jsonl"}]
    with pytest.raises((ConfigError, ValueError), match="rows of ids have no text"):
        PrepareConfig.model_validate(
            {"output": "o", "tokenizer": "t", "sources": ids, "decontaminate": sets}
        )
