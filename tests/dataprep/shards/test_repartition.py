"""Finished directories to one: another number of shards, another order, blends by weight."""

import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.dataprep.rows.row_keys import permute_keys
from headrace.dataprep.shards.blend_inputs import Blend
from headrace.dataprep.shards.blend_manifest import LEFT_OUT
from headrace.dataprep.shards.repartition import parse_weights, repartition
from headrace.dataprep.shards.verify import verify
from headrace.dataprep.work.budgets import Budgets
from headrace.dataprep.work.local_engine import LocalEngine
from headrace.jobs import cli
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.shards.manifest import ShardRecord
from headrace.schemas.shards.manifest_file import read_manifest, write_manifest
from headrace.schemas.shards.parquet_options import parquet_options


class KilledError(Exception):
    """Stands for a kill at this moment."""


@pytest.fixture
def blend(corpus):
    """`repartition` without anything on the terminal."""

    def blend(*directories, output="new", shards=3, workers=1, budgets=None, **options):
        what = Blend(tuple(map(Path, directories)), Path(output), shards, **options)
        return repartition(what, LocalEngine(workers), budgets=budgets)

    return blend


@pytest.fixture
def code(corpus, make_config, run):
    """Short rows of one source, in `code`."""
    sources = [{"name": "code", "type": "text", "path": "corpus/0*.txt"}]
    return run(make_config("code", sources=sources, packing="none", overlong="split"))


@pytest.fixture
def prose(corpus, make_config, run):
    """Longer rows of two sources, of which `code` also has one, in `prose`."""
    names = {"prose": "corpus/1[0-7]*.txt", "code": "corpus/1[89]*.txt"}
    sources = [{"name": name, "type": "text", "path": path} for name, path in names.items()]
    return run(make_config("prose", sources=sources, packing="none", overlong="truncate"))


def texts(rows):
    """What rows hold besides their keys, in order."""
    return [(row["source"], *row["input_ids"], *row["document_lengths"]) for row in rows]


def test_the_same_seed_gives_the_directory_that_prepare_writes_with_those_shards(
    corpus, make_config, run, blend, snapshot
):
    run(make_config("three", seed=5))
    for shards in (1, 7):
        run(make_config(f"prepared-{shards}", seed=5, shards=shards))
        blend("three", output=f"cut-{shards}", shards=shards, seed=5)
        prepared = snapshot(f"prepared-{shards}")
        assert prepared.pop("report.html")  # which counts what only `prepare` sees
        assert snapshot(f"cut-{shards}") == prepared


def test_another_seed_gives_the_same_rows_in_another_order(
    corpus, make_config, run, blend, rows_of
):
    run(make_config())
    blend("out", shards=5)
    blend("out", output="other", shards=5, seed=17)
    assert not verify(Path("new"))
    for split in ("train", "evaluation"):
        before, after = rows_of("out", split), rows_of("new", split)
        other = rows_of("other", split)
        assert Counter(texts(before)) == Counter(texts(after)) == Counter(texts(other))
        assert texts(before) != texts(after) != texts(other) != texts(before)
        keys = [row["row_key"] for row in after]
        assert keys == sorted(keys)
    assert read_manifest(Path("new")).ledger == read_manifest(Path("out")).ledger
    assert read_manifest(Path("new")).sources == read_manifest(Path("out")).sources


def test_neighbors_are_parted(corpus, make_config, run, blend, rows_of):
    run(make_config(evaluation_fraction=0, sequence_len=16, shards=1))
    blend("out", shards=1)
    place = {text: index for index, text in enumerate(texts(rows_of("out")))}
    places = [place[text] for text in texts(rows_of("new"))]
    assert len(places) > 1500
    near = sum(abs(a - b) < 10 for a, b in itertools.pairwise(places))
    assert near < 0.05 * len(places)  # about 18 / n by chance


def test_all_rows_of_several_directories_are_blended(code, prose, blend, rows_of, snapshot):
    new = blend("code", "prose", shards=2)
    assert not verify(Path("new"))
    for split in ("train", "evaluation"):
        both = [*rows_of("code", split), *rows_of("prose", split)]
        assert Counter(texts(both)) == Counter(texts(rows_of("new", split)))
    assert new.ledger.tokens_in == code.ledger.tokens_in + prose.ledger.tokens_in
    assert new.ledger.tokens_dropped == prose.ledger.tokens_dropped != {}
    assert new.packing == "none"
    records = {source.name: source for source in new.sources}
    assert list(records) == ["code", "prose"]
    assert records["prose"] == prose.sources[0]
    assert records["code"].documents == code.sources[0].documents + prose.sources[1].documents
    assert records["code"].document_length_quantiles == {}
    first_shard = Counter(row["source"] for row in rows_of("new")[: new.shards[0].rows])
    assert min(first_shard.values()) > 10


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.2, 0.7), (1.0, 40.0)], ids=str)
def test_weights_are_shares_of_the_train_tokens(weights, code, prose, blend, rows_of):
    new = blend("code", "prose", weights=weights)
    assert not verify(Path("new"))
    originals = [Counter(texts(rows_of(name))) for name in ("code", "prose")]
    found = Counter(texts(rows_of("new")))
    tokens = [
        sum(len(t) - 2 for t, n in (found & original).items() for _ in range(n))
        for original in originals
    ]
    assert sum(tokens) == sum(shard.tokens for shard in new.split("train"))
    assert tokens[0] / tokens[1] == pytest.approx(weights[0] / weights[1], rel=64 / min(tokens))
    assert sum(found.values()) == sum((found & (originals[0] + originals[1])).values())
    whole = [sum(s.tokens for s in m.split("train")) for m in (code, prose)]
    assert any(0 <= all_ - taken < 64 for all_, taken in zip(whole, tokens, strict=True))
    assert new.ledger.tokens_dropped[LEFT_OUT] == sum(whole) - sum(tokens) > 0
    kept = sum(m.ledger.tokens_out["evaluation"] for m in (code, prose))
    assert new.ledger.tokens_out["evaluation"] == kept > 0


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_kills_do_not_change_bytes(workers, code, prose, blend, snapshot, monkeypatch):
    options = {"shards": 4, "weights": (1.0, 1.0), "budgets": Budgets(portion_tokens=2000)}
    blend("code", "prose", output="right", **options)
    for moment in ("run_row_slice", "write_shard"):
        place = (
            "headrace.dataprep." + {"r": "shards.repartition", "w": "passes.merge_runs"}[moment[0]]
        )
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(f"{place}.{moment}", killed_at_third_call(f"{place}.{moment}"))
            blend("code", "prose", **options)
        assert not Path("new/manifest.json").exists()
    written = {p: p.stat().st_mtime_ns for p in Path("new/.work").glob("*.done.json")}
    assert len(written) > 3
    blend("code", "prose", workers=workers, **options)
    assert snapshot("new") == snapshot("right")
    assert not verify(Path("new"))


def killed_at_third_call(target):
    """The function of this name, which does not survive its third call."""
    from importlib import import_module

    module, _, name = target.rpartition(".")
    function = getattr(import_module(module), name)
    calls = []

    def call(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise KilledError
        return function(*arguments)

    return call


def test_memory_limits_do_not_change_bytes(code, prose, blend, snapshot):
    blend("code", "prose", output="large")
    few = Budgets(portion_tokens=1500, held_tokens=700, gathered_tokens=500)
    blend("code", "prose", output="small", budgets=few)
    assert snapshot("small") == snapshot("large")


def test_a_finished_directory_is_reused_and_others_are_left_alone(code, blend):
    first = blend("code")
    assert blend("code") == first
    with pytest.raises(DataError, match=r"^new: finished with other settings or from other dir"):
        blend("code", shards=4)


def test_the_output_must_not_be_an_input(code, make_config, run, blend):
    run(make_config("prose"))
    Path("code/manifest.json").rename("code/kept")
    shutil.copytree("prose", "code/prose")
    with pytest.raises(ConfigError, match=r"^--out code: overlaps code/prose; set another$"):
        blend("code/prose", output="code")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_len": 32}, "^other: sequence_len 32, but code has 64; prepare both alike$"),
        ({"eos": "never"}, None),
    ],
    ids=str,
)
def test_directories_that_do_not_fit_together_are_refused(
    changes, message, code, make_config, run, blend
):
    run(make_config("other", **changes))
    if message is None:
        assert blend("code", "other").packing == "concatenate+none"
        return
    with pytest.raises(DataError, match=message):
        blend("code", "other")


def test_another_tokenizer_is_refused(code, make_config, run, blend, bos_tokenizer_folder):
    run(make_config("other", tokenizer=str(bos_tokenizer_folder)))
    with pytest.raises(DataError, match=r"^other: tokenizer [0-9a-f]{12}, but code has [0-9a-f]"):
        blend("code", "other")


def test_the_same_directory_twice_is_refused(code, blend):
    with pytest.raises(ConfigError, match=r"a directory is named twice"):
        blend("code", "./code")


def test_a_damaged_shard_is_named(code, blend):
    path = Path("code/shard-00001.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    verify_it = "run `headrace verify code`$"
    with pytest.raises(
        DataError, match=rf"^code/shard-00001\.parquet: row group \d: .*{verify_it}"
    ):
        blend("code")
    path.write_bytes(content[:-1])
    with pytest.raises(
        DataError,
        match=rf"^code/shard-00001\.parquet: \d+ bytes, the manifest says \d+; {verify_it}",
    ):
        blend("code")


def forge(name, change):
    """Write a shard anew with other rows, and its manifest so that size and hash fit it."""
    path = Path(name, "shard-00001.parquet")
    manifest = read_manifest(Path(name))
    rows = max(group.rows for group in manifest.split("train")[1].row_groups)
    pq.write_table(change(pq.read_table(path)), path, row_group_size=rows, **parquet_options())
    found = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    shards = [
        ShardRecord.model_validate(shard.model_dump() | (found if shard.file == path.name else {}))
        for shard in manifest.shards
    ]
    write_manifest(Path(name), manifest.model_copy(update={"shards": shards}))


def with_ids(table, change):
    ids = [change(row) for row in table["input_ids"].to_pylist()]
    field = table.schema.field("input_ids")
    return table.set_column(0, field, [pa.array(ids, field.type)])


FORGERIES = {
    "other columns": (
        lambda table: table.drop_columns(["document_lengths"]),
        "column document_lengths is missing",
    ),
    "another version": (
        lambda table: table.replace_schema_metadata({"format": "headrace shards"}),
        "its footer has ",
    ),
    "unknown columns": (
        lambda table: table.append_column("weight", pa.array([1.0] * len(table))),
        "column weight is none of the shard format",
    ),
    "more than is declared": (
        lambda table: with_ids(table, lambda row: [7] * 40_000),
        "it unpacks to .* bytes, at most ",
    ),
    "ids past the vocabulary": (
        lambda table: with_ids(table, lambda row: [*row[:-1], 999]),
        "column input_ids, row 0: id 999",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_rows_that_break_the_format_are_refused_though_the_hashes_fit(name, code, blend):
    change, message = FORGERIES[name]
    forge("code", change)
    with pytest.raises(DataError, match=rf"^code/shard-00001\.parquet: .*{message}"):
        blend("code")
    assert any(re.search(message, problem) for problem in verify(Path("code")))


def test_shards_of_the_first_release_get_the_columns_of_this_one(code, blend, rows_of):
    forge("code", lambda table: table.drop_columns(["control_class"]))
    blend("code")
    assert not verify(Path("new"))
    assert {row["control_class"] for row in rows_of("new")} == {None}


@pytest.mark.parametrize("text", ["1", "1,x", "1,0", "1,-2", "1,nan", "1,inf", "1,2,3"])
def test_weights_that_make_no_sense_are_refused(text):
    with pytest.raises(ConfigError, match=f"^--weights {text}: "):
        parse_weights(text, 2)


def test_keys_are_permuted():
    keys = np.concatenate(
        [np.arange(1 << 16, dtype=np.uint64), np.array([1 << 63, (1 << 64) - 1], np.uint64)]
    )
    new = permute_keys(keys, 3, "repartition", 0)
    assert len(np.unique(new)) == len(keys)
    assert len(np.intersect1d(new, permute_keys(keys, 3, "repartition", 1))) == 0
    bits = np.unpackbits(new.view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert np.all(np.abs(bits - 0.5) < 0.02)


def test_rejects_are_carried_on(corpus, make_config, run, blend):
    (corpus / "050.txt").write_bytes(b"\xff")
    run(make_config(max_reject_fraction=0.1))
    blend("out")
    assert not verify(Path("new"))
    (line,) = Path("new/rejects/rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "corpus/050.txt"


def test_the_command_blends_and_says_where_every_token_went(code, prose, blend, snapshot, capsys):
    blend("code", "prose", output="right", shards=2, seed=9, weights=(1.0, 2.0))
    words = "repartition code prose --out new --shards 2 --seed 9 --weights 1,2 --workers 2"
    with pytest.raises(SystemExit) as stop:
        cli.main(words.split())
    assert not stop.value.code
    assert snapshot("new") == snapshot("right")
    assert f"dropped: {LEFT_OUT}" in capsys.readouterr().out
