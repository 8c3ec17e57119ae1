"""`verify` names every file that is not what was written."""

import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from headrace.dataprep.shards.verify import verify
from headrace.jobs.console.inspection import inspect, print_rows_of_keys
from headrace.schemas.errors import DataError
from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.shards.manifest import ShardRecord
from headrace.schemas.shards.manifest_file import read_manifest, write_manifest
from headrace.schemas.shards.parquet_options import parquet_options

OUT = Path("out")
SHARD = OUT / "shard-00001.parquet"


@pytest.fixture
def shards(corpus, make_config, run):
    run(make_config())


def flip_byte():
    data = bytearray(SHARD.read_bytes())
    data[len(data) // 2] ^= 1
    SHARD.write_bytes(data)


def edit_manifest():
    path = OUT / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def edit_json(name, old, new):
    path = OUT / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


DAMAGES = {
    "a flipped byte": (flip_byte, r"out/shard-00001.parquet: damaged \(its SHA-256 differs\)"),
    "a truncated file": (
        lambda: SHARD.write_bytes(SHARD.read_bytes()[:-9]),
        r"out/shard-00001.parquet: \d+ bytes, \d+ were written",
    ),
    "a missing file": (SHARD.unlink, "out/shard-00001.parquet: missing"),
    "an edited manifest": (edit_manifest, "out/manifest.json: edited or damaged .*"),
    "no manifest": ((OUT / "manifest.json").unlink, "out/manifest.json: not found; .*"),
    "an extra shard": (
        lambda: (OUT / "shard-00003.parquet").write_bytes(SHARD.read_bytes()),
        "out/shard-00003.parquet: not in the manifest; remove it",
    ),
    "another tokenizer": (
        lambda: edit_json("tokenizer.json", '"<s>"', '"<S>"'),
        r"out/tokenizer.json: not the tokenizer of these shards \(its SHA-256 differs\)",
    ),
    "an edited config": (
        lambda: edit_json("prepare.json", '"sequence_len": 64', '"sequence_len": 65'),
        r"out/prepare.json: not the config of these shards \(its fingerprint differs\)",
    ),
    "missing rejects": (
        (OUT / "rejects/rejects.jsonl").unlink,
        "out/rejects/rejects.jsonl: missing",
    ),
}


def test_a_sound_directory_has_no_problems(shards):
    assert verify(OUT) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_file_named(damage, shards):
    break_it, message = DAMAGES[damage]
    break_it()
    (problem,) = verify(OUT)
    assert re.fullmatch(message, problem)


def forge(change):
    """Rewrite a shard with changed rows, and a manifest whose hashes fit it."""
    pq.write_table(change(pq.read_table(SHARD)), SHARD, row_group_size=16, **parquet_options())
    manifest = read_manifest(OUT)
    found = {"bytes": SHARD.stat().st_size, "sha256": file_sha256(SHARD)}
    shards = [
        ShardRecord.model_validate(shard.model_dump() | (found if shard.file == SHARD.name else {}))
        for shard in manifest.shards
    ]
    write_manifest(OUT, manifest.model_copy(update={"shards": shards}))


def set_column(table, name, values):
    field = table.schema.field(name)
    return table.set_column(
        table.schema.get_field_index(name), field, [pa.array(values, field.type)]
    )


def add_to_first(table, name, number):
    values = table[name].to_pylist()
    values[0][0] += number
    return set_column(table, name, values)


FORGERIES = {
    "fewer rows": (lambda table: table.slice(1), "row groups?"),
    "unsorted": (
        lambda table: set_column(table, "row_key", table["row_key"].to_pylist()[::-1]),
        "row keys are not sorted",
    ),
    "row groups in another order": (
        lambda table: pa.concat_tables([table.slice(16, 16), table.slice(0, 16), table.slice(32)]),
        "row group 1: row keys are not sorted",
    ),
    "ids past the vocabulary": (lambda table: add_to_first(table, "input_ids", 999), "ids from"),
    "lengths that do not sum": (
        lambda table: add_to_first(table, "document_lengths", 1),
        "document_lengths do not sum to the rows' lengths",
    ),
    "other metadata": (
        lambda table: table.replace_schema_metadata({"format_version": "9"}),
        "footer",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_wrong_rows_are_found_even_when_the_hashes_fit(name, corpus, make_config, run):
    run(make_config())
    change, message = FORGERIES[name]
    forge(change)
    problems = verify(OUT)
    assert problems
    assert all(problem.startswith("out/shard-00001.parquet: ") for problem in problems)
    assert any(re.search(message, problem) for problem in problems)


def test_counts_that_disagree_inside_the_manifest_are_found(shards):
    manifest = read_manifest(OUT)
    ledger = manifest.ledger.model_copy(update={"tokens_in": manifest.ledger.tokens_in + 5})
    write_manifest(OUT, manifest.model_copy(update={"ledger": ledger}))
    assert verify(OUT) == ["out/manifest.json: the token ledger is off by 5"]


def test_inspect_finds_rows_by_the_keys_that_an_anomaly_names(shards):
    file = read_manifest(OUT).shards[-1].file
    wanted = pq.read_table(OUT / file).slice(1, 1).to_pylist()[0]
    console = Console(file=io.StringIO(), width=200)
    print_rows_of_keys(OUT, [wanted["row_key"]], console)
    shown = console.file.getvalue()
    assert f"{file} row 1, {wanted['source']}, key {wanted['row_key']} " in shown
    assert shown.count("key") == 1
    assert f"┃{wanted['document_lengths'][0]} tokens┃ " in shown
    with pytest.raises(DataError, match=r"^out: no row has the key 7, 8; look in the other"):
        print_rows_of_keys(OUT, [7, wanted["row_key"], 8], console)


def test_inspect_shows_counts_and_rows_with_their_documents(shards):
    console = Console(file=io.StringIO(), width=200)
    inspect(OUT, 2, console)
    shown = console.file.getvalue()
    assert "rows of 64 tokens" in shown
    assert "token ledger" in shown
    assert "evaluation-00000.parquet row 1" in shown
    manifest = json.loads((OUT / "manifest.json").read_text())
    assert f"{manifest['ledger']['tokens_in']:,}" in shown
    assert re.search(r"┃\d+ tokens┃ .*(water|wheel|mill)", shown)


def shown(**options):
    console = Console(file=io.StringIO(), width=300, **options)
    inspect(OUT, 1, console)
    return console.file.getvalue()


def test_text_of_files_is_no_markup_and_obeyed_by_no_terminal(corpus, make_config, run):
    (corpus / "000.txt").write_text("[bold]\x1b[2J\x9b2J\r\x08 water [/nothing]")
    sources = [{"name": "a[/b][red]", "type": "text", "path": "corpus/00[0-3].txt"}]
    run(make_config(sources=sources, packing="none", overlong="split"))
    reject = {"source": "a[/b]", "reason": "[blink]\x1b]0;title\x07", "file": "f", "line": 1}
    (OUT / "rejects/rejects.jsonl").write_text(json.dumps(reject) + "\n")
    for options in ({}, {"markup": False}):
        text = shown(**options)
        assert "a[/b][red]" in text
        assert "refused in a[/b]: [blink]␛]0;title␇: 1 documents" in text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


@pytest.mark.parametrize("line", ["[1]", "{}", "\xff", "not JSON", "[" * 100_000])
def test_rejects_that_are_none_end_in_one_line(line, shards):
    (OUT / "rejects/rejects.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"^out/rejects/rejects\.jsonl:1: not a refused document"):
        shown()
