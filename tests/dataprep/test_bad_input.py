"""Every mistake ends in one line that names the place and says what to do."""

import gzip
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.schemas.errors import DataError, HeadraceError
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.toml_config import load_config

RECORDS = [{"text": f"stone {number} " * 5} for number in range(50)]


def lines(*broken):
    """Fifty good records in JSONL, with broken lines in the middle."""
    good = [json.dumps(record).encode() for record in RECORDS]
    return b"\n".join([*good[:25], *broken, *good[25:]]) + b"\n"


def read_rejects():
    return [json.loads(line) for line in Path("out/rejects/rejects.jsonl").read_text().splitlines()]


def text_source(path):
    return [{"name": "mill", "type": "text", "path": path}]


def document_source(path="in.jsonl", **more):
    return [{"name": "mill", "type": "documents", "path": path, **more}]


REFUSED = {
    "invalid UTF-8": (
        b'{"text": "a\xffb"}',
        "invalid UTF-8: byte 0xff at byte 11 of the document",
    ),
    "a broken line": (b'{"text": "a', "broken JSON: column 10: Unterminated string starting at"),
    "deep nesting": (b"[" * 100_000, None),
    "no object": (b'["text"]', "not an object: the record is a list"),
    "a missing field": (b'{"body": "a"}', 'missing field: no field "text"'),
    "a number": (b'{"text": 5}', 'not a string: field "text" is a number'),
    "a null": (b'{"text": null}', 'not a string: field "text" is null'),
    "an empty text": (b'{"text": ""}', "empty document: no characters"),
    "a lone surrogate": (
        b'{"text": "ab\\ud800"}',
        r"invalid UTF-8: lone surrogate '\ud800' at character 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_record_is_refused_and_leaves_its_neighbors_alone(
    name, corpus, make_config, run, rows_of, documents_of
):
    record, problem = REFUSED[name]
    Path("in.jsonl").write_bytes(lines(record))
    changes = {"evaluation_fraction": 0.0, "sequence_len": 4096, "sources": document_source()}
    with pytest.raises(DataError) as refused:
        run(make_config(**changes))
    message = str(refused.value)
    assert message.startswith(
        "1 of 51 documents refused, more than max_reject_fraction = 0.001 allows: in.jsonl:26: "
    )
    assert message.endswith(
        "all are in out/rejects/rejects.jsonl; repair them, or raise max_reject_fraction"
    )
    assert problem is None or f"in.jsonl:26: {problem}; " in message
    assert "\n" not in message
    manifest = run(make_config(max_reject_fraction=0.1, **changes))
    assert documents_of("out") == sorted(record["text"] for record in RECORDS)
    assert manifest.sources[0].rejected_documents == 1
    (line,) = Path("out/rejects/rejects.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"source", "file", "line", "reason", "detail"}


def test_lines_of_rejects_count_from_the_files_start_in_every_block(corpus, make_config, run):
    bad = [number for number in range(1, 400) if number % 50 == 0]
    content = [b"{" if n in bad else json.dumps(RECORDS[n % 50]).encode() for n in range(1, 400)]
    Path("in.jsonl").write_bytes(b"\n".join(content))
    run(make_config(sources=document_source(), max_reject_fraction=1.0))
    rejects = read_rejects()
    assert [reject["line"] for reject in rejects] == bad


def test_a_bad_byte_in_a_text_is_named_by_its_line(corpus, make_config, run):
    (corpus / "007.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(
        DataError,
        match=r"corpus/007\.txt:3: invalid UTF-8: byte 0xe9 at byte 11 of the document; ",
    ):
        run(make_config())


def test_an_empty_file_is_an_empty_document(corpus, make_config, run):
    (corpus / "007.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"corpus/007.txt:1: empty document: no characters; "):
        run(make_config())


def test_invalid_utf8_in_parquet_concerns_one_record(corpus, make_config, run):
    texts = pa.array([b"good", b"b\xffd", b"good", None], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 4, texts.buffers())
    pq.write_table(pa.table({"text": column}), "in.parquet")
    changes = {"sources": document_source("in.parquet"), "max_reject_fraction": 1.0}
    manifest = run(make_config(evaluation_fraction=0.0, **changes))
    rejects = read_rejects()
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [
        (2, "invalid UTF-8"),
        (4, "not a string"),
    ]
    assert manifest.sources[0].documents == 2


def write(name, content):
    Path(name).write_bytes(content)


def write_parquet(name, column="text", cut=0):
    pq.write_table(pa.table({column: ["stone"] * 50}), name)
    write(name, Path(name).read_bytes()[: -cut or None])


def copy_tokenizer(tokenizer_folder, config=None, content=None):
    shutil.copytree(tokenizer_folder, "tokenizer")
    if config is not None:
        write("tokenizer/tokenizer_config.json", config)
    if content is not None:
        write("tokenizer/tokenizer.json", content)


# what was done wrong, what is changed in the config, the whole message
MISTAKES = {
    "a directory for a file": (
        lambda _: None,
        {"sources": text_source("corpus")},
        'source "mill": corpus is a directory; name files, for example "corpus/*.txt"',
    ),
    "a glob that matches nothing": (
        lambda _: None,
        {"sources": text_source("corpus/*.md")},
        'source "mill": no file matches corpus/*.md; correct the path',
    ),
    "a missing file": (
        lambda _: None,
        {"sources": text_source(["corpus/000.txt", "none.txt"])},
        'source "mill": no file matches none.txt; correct the path',
    ),
    "an empty source": (
        lambda _: write("in.jsonl", b"\n\n"),
        {"sources": document_source()},
        'source "mill": no documents in in.jsonl; correct the path, or remove the source',
    ),
    "truncated gzip": (
        lambda _: write("in.jsonl.gz", gzip.compress(lines())[:-20]),
        {"sources": document_source("in.jsonl.gz")},
        "in.jsonl.gz: cannot be read to its end (Truncated compressed stream); replace the file",
    ),
    "no gzip": (
        lambda _: write("in.jsonl.gz", lines()),
        {"sources": document_source("in.jsonl.gz")},
        "in.jsonl.gz: cannot be read to its end "
        "(zlib inflate failed: incorrect header check); replace the file",
    ),
    "truncated Parquet": (
        lambda _: write_parquet("in.parquet", cut=10),
        {"sources": document_source("in.parquet")},
        "in.parquet: not readable as Parquet (Parquet magic bytes not found in footer. Either the "
        "file is corrupted or this is not a parquet file); replace the file",
    ),
    "another column": (
        lambda _: write_parquet("in.parquet", column="body"),
        {"sources": document_source("in.parquet")},
        'in.parquet: no column "text"; set text_field to one of: body',
    ),
    "a column of numbers": (
        lambda _: pq.write_table(pa.table({"text": [1, 2]}), "in.parquet"),
        {"sources": document_source("in.parquet")},
        'in.parquet: column "text" is int64, not string; set text_field to a column of strings',
    ),
    "a broken JSON list": (
        lambda _: write("in.json", b'[{"text": "a"},\n {"text": "b"'),
        {"sources": document_source("in.json")},
        "in.json:1: the file ends in the record that begins here; repair the JSON list, or write "
        "JSONL",
    ),
    "no tokenizer": (
        lambda _: None,
        {"tokenizer": "nowhere"},
        "nowhere/tokenizer.json: not found; set tokenizer to a directory with tokenizer.json",
    ),
    "a broken tokenizer": (
        lambda folder: copy_tokenizer(folder, content=b"{"),
        {"tokenizer": "tokenizer"},
        "tokenizer/tokenizer.json: not a tokenizer "
        "(EOF while parsing an object at line 1 column 1); replace the file",
    ),
    "a broken tokenizer config": (
        lambda folder: copy_tokenizer(folder, config=b"{"),
        {"tokenizer": "tokenizer"},
        "tokenizer/tokenizer_config.json: not valid JSON (Expecting property name enclosed in "
        "double quotes: line 1 column 2 (char 1)); replace the file",
    ),
    "no EOS": (
        lambda folder: copy_tokenizer(folder, config=b"{}"),
        {"tokenizer": "tokenizer"},
        'tokenizer: eos = "auto", but no EOS token is named in tokenizer_config.json; '
        'name it there as "eos_token", or set eos = "never"',
    ),
    "no BOS": (
        lambda folder: copy_tokenizer(folder, config=b"{}"),
        {"tokenizer": "tokenizer", "bos": "always", "eos": "never"},
        'tokenizer: bos = "always", but no BOS token is named in tokenizer_config.json; '
        'name it there as "bos_token", or set bos = "never"',
    ),
    "an EOS that is no token": (
        lambda folder: copy_tokenizer(folder, config=b'{"eos_token": "<none>"}'),
        {"tokenizer": "tokenizer"},
        'tokenizer/tokenizer_config.json: eos_token "<none>" is not in tokenizer.json; correct it',
    ),
    "an output with other files": (
        lambda _: (Path("out").mkdir(), write("out/notes.txt", b"mine")),
        {},
        "out: holds other files and no unfinished run; set another output, or empty it",
    ),
    "an output that is a file": (
        lambda _: write("out", b""),
        {},
        "out: is a file; set output to a directory",
    ),
    "everything for evaluation": (
        lambda _: write("one.txt", b"one"),
        {"sources": text_source("one.txt"), "evaluation_fraction": 0.9999},
        "the evaluation split took every document (1); lower evaluation_fraction",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_one_line(name, corpus, make_config, run, tokenizer_folder):
    make_it, changes, message = MISTAKES[name]
    make_it(tokenizer_folder)
    with pytest.raises(DataError) as error:
        run(make_config(**changes))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sequence_len": 32},
            "out: finished with another config (other: sequence_len); set another output, "
            "or remove the directory",
        ),
        (
            {"sources": text_source("corpus/0*.txt")},
            "out: finished with another config (other: sources.0.path); set another output, "
            "or remove the directory",
        ),
    ],
)
def test_a_finished_directory_is_not_mixed_with_another_config(
    changes, message, corpus, make_config, run, snapshot
):
    run(make_config())
    before = snapshot("out")
    with pytest.raises(DataError) as error:
        run(make_config(**changes))
    assert str(error.value) == message
    assert snapshot("out") == before


def test_a_finished_directory_is_not_reused_for_other_inputs(corpus, make_config, run):
    run(make_config())
    (corpus / "new.txt").write_text("a new document")
    with pytest.raises(DataError) as error:
        run(make_config())
    assert str(error.value) == (
        "out: finished from other inputs; set another output, or remove the directory"
    )


def test_a_worker_brings_its_error_back_in_one_line(corpus, make_config, run):
    write("a.jsonl.gz", gzip.compress(lines())[:-20])
    write("b.jsonl.gz", gzip.compress(lines()))
    with pytest.raises(DataError, match=r"^a\.jsonl\.gz: cannot be read to its end "):
        run(make_config(sources=document_source("*.gz"), block_bytes=1024), workers=2)


CONFIG = """
output = "out"
tokenizer = "tokenizer"
[[sources]]
name = "mill"
type = "text"
path = "corpus/*.txt"
"""
WRONG_CONFIGS = {
    "an unknown key": ("output =", "outptu =", 'did you mean "output"'),
    "two sources of one name": (
        "[[sources]]",
        '[[sources]]\nname = "mill"\ntype = "text"\npath = "a"\n[[sources]]',
        'two sources are named "mill"',
    ),
    "a separator for documents": (
        'type = "text"',
        'type = "documents"\ndocument_separator = "a"',
        'document_separator is for type = "text"',
    ),
    "an unknown type": ('"text"', '"video"', "text"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_wrong_config_names_its_line(name, tmp_path):
    old, new, message = WRONG_CONFIGS[name]
    path = tmp_path / "prepare.toml"
    path.write_text(CONFIG.replace(old, new, 1))
    with pytest.raises(HeadraceError) as error:
        load_config(PrepareConfig, path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
