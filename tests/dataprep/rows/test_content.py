"""What is in the rows: every token of every document, once, in the split it belongs to."""

import json
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headrace.dataprep.prepare import prepare
from headrace.dataprep.rows.split_and_sample import choose_split
from headrace.schemas.fingerprint import derive_seeds
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.shards.manifest_file import read_manifest

DOCUMENTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1)


def rows_in_packing_order(directory, config, split):
    """Rows as they were packed, found by asking for the key of each place in turn."""
    paths = sorted(Path(directory).glob("*.parquet"))
    rows = {row["row_key"]: row for path in paths for row in pq.read_table(path).to_pylist()}
    found = []
    for source in config.sources:
        for task in range(1000):
            in_task = len(found)
            for block in range(1000):
                in_block = len(found)
                for key in derive_seeds(config.seed, "row", source.name, split, task, block):
                    if key not in rows:
                        break
                    found.append(rows[key])
                if len(found) == in_block and block > 5:
                    break
            if len(found) == in_task and task > 20:
                break
    return found


@settings(deadline=None, max_examples=30)
@given(
    documents=DOCUMENTS,
    sequence_len=st.integers(8, 40),
    shards=st.integers(1, 4),
    fraction=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 3),
)
def test_rows_in_packing_order_give_back_every_document(
    documents, sequence_len, shards, fraction, seed, tokenizer_folder
):
    folder = Path(tempfile.mkdtemp())
    try:
        lines = [json.dumps({"text": text}) + "\n" for text in documents]
        (folder / "in.jsonl").write_text("".join(lines))
        config = PrepareConfig.model_validate(
            {
                "output": str(folder / "out"),
                "tokenizer": str(tokenizer_folder),
                "sequence_len": sequence_len,
                "shards": shards,
                "seed": seed,
                "evaluation_fraction": fraction,
                "block_bytes": 1024,
                "row_group_tokens": 100,
                "sources": [{"name": "a", "type": "documents", "path": f"{folder}/in.jsonl"}],
            }
        )
        expected = {"train": [], "evaluation": []}
        for text in documents:
            expected[choose_split(config, text)].append(text)
        if not expected["train"]:
            return
        manifest = prepare(config, 1)
        assert manifest.ledger.difference() == 0
        for split, texts in expected.items():
            rows = rows_in_packing_order(folder / "out", config, split)
            assert sum(len(r["input_ids"]) for r in rows) == manifest.ledger.tokens_out[split]
            assert all(0 < len(row["input_ids"]) <= sequence_len for row in rows)
            assert all(sum(r["document_lengths"]) == len(r["input_ids"]) for r in rows)
            assert all(min(row["document_lengths"]) > 0 for row in rows)
            tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
            ids = [token for row in rows for token in row["input_ids"]]
            decoded = tokenizer.decode(ids, skip_special_tokens=False)
            assert decoded == "".join(text + "</s>" for text in texts)
    finally:
        shutil.rmtree(folder)


def test_document_lengths_are_those_of_the_pieces_in_a_row(corpus, make_config, run, rows_of):
    for path in corpus.iterdir():
        path.unlink()
    (corpus / "a.txt").write_bytes(b"x" * 10)
    (corpus / "b.txt").write_bytes(b"y" * 13)
    run(make_config(sequence_len=8, evaluation_fraction=0.0, shards=1))
    pieces = sorted(row["document_lengths"] for row in rows_of("out"))
    assert pieces == sorted([[8], [3, 5], [8], [1]])


def test_no_document_lies_in_both_splits(corpus, make_config, run, rows_of, documents_of):
    for path in corpus.iterdir():
        (corpus / f"copy-{path.name}").write_bytes(path.read_bytes())
    config = make_config(evaluation_fraction=0.3, sequence_len=4096)
    run(config)
    texts = {path.read_text() for path in corpus.iterdir()}
    evaluation = {text for text in texts if choose_split(config, text) == "evaluation"}
    assert 20 < len(evaluation) < 100
    run(make_config("train", evaluation_fraction=0.0, sequence_len=4096))
    assert set(documents_of("train")) == texts
    assert len(documents_of("out")) == 2 * len(texts)
    shutil.rmtree("train")
    Path("train").mkdir()
    for path in Path("out").glob("shard-*"):
        shutil.copy(path, "train")
    assert set(documents_of("train")) == texts - evaluation


def test_rows_come_in_another_order_than_the_input(corpus, make_config, run, rows_of):
    config = make_config(evaluation_fraction=0.0)
    run(config)
    rows = [row["row_key"] for row in rows_of("out")]
    packed = [row["row_key"] for row in rows_in_packing_order("out", config, "train")]
    assert sorted(rows) == sorted(packed) == rows
    neighbors = sum(abs(packed.index(a) - packed.index(b)) == 1 for a, b in pairwise(rows))
    assert neighbors < len(rows) / 10


def test_another_seed_gives_another_order_of_the_same_rows(corpus, make_config, run, rows_of):
    for seed in (0, 1):
        run(make_config(f"seed{seed}", seed=seed, evaluation_fraction=0.0))
    first, second = ([row["input_ids"] for row in rows_of(f"seed{seed}")] for seed in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_small_files_share_blocks_so_that_few_rows_are_short(corpus, make_config, run, rows_of):
    run(make_config(evaluation_fraction=0.0, block_bytes=1 << 20))
    assert sum(len(row["input_ids"]) < 64 for row in rows_of("out")) == 1


def test_bos_is_added_where_the_tokenizer_adds_it(
    corpus, make_config, run, rows_of, bos_tokenizer_folder
):
    def first_ids(output, **changes):
        run(make_config(output, sequence_len=4096, evaluation_fraction=0.0, **changes))
        starts = []
        for row in rows_of(output):
            start = 0
            for length in row["document_lengths"]:
                starts.append(row["input_ids"][start])
                start += length
        return set(starts)

    assert 0 not in first_ids("plain")
    assert first_ids("always", bos="always") == {0}
    assert first_ids("auto", tokenizer=str(bos_tokenizer_folder)) == {0}
    assert 0 not in first_ids("never", tokenizer=str(bos_tokenizer_folder), bos="never")


def test_special_tokens_in_a_text_stay_text_unless_asked_for(corpus, make_config, run, rows_of):
    (corpus / "000.txt").write_text("<s>grain</s>")
    changes = {
        "evaluation_fraction": 0.0,
        "sources": [source("one", "corpus/000.txt")],
        "shards": 1,
    }
    run(make_config("text", **changes))
    run(make_config("parsed", parse_special_tokens=True, **changes))
    (text,), (parsed,) = rows_of("text"), rows_of("parsed")
    assert text["input_ids"].count(0) == 0
    assert text["input_ids"].count(1) == 1
    assert parsed["input_ids"][0] == 0
    assert parsed["input_ids"].count(1) == 1, "an EOS that is there already is not added again"


def test_the_manifest_counts_each_source(corpus, make_config, run, rows_of):
    sources = [source("low", "corpus/0*.txt"), source("high", "corpus/1*.txt")]
    manifest = run(make_config(sources=sources))
    assert [(s.name, s.documents) for s in manifest.sources] == [("low", 100), ("high", 100)]
    for record in manifest.sources:
        rows = [r for split in ("train", "evaluation") for r in rows_of("out", split)]
        own = [row for row in rows if row["source"] == record.name]
        assert record.rows == len(own)
        assert record.tokens == sum(len(row["input_ids"]) for row in own)
    lengths = manifest.sources[0].document_length_quantiles
    assert lengths["p0"] < lengths["p50"] < lengths["p100"]
    assert read_manifest(Path("out")) == manifest


def test_more_shards_than_rows_leave_some_shards_empty(corpus, make_config, run, rows_of):
    changes = {"evaluation_fraction": 0.0, "sources": [source("one", "corpus/000.txt")]}
    manifest = run(make_config(shards=40, **changes))
    assert len(manifest.shards) == 40
    assert sum(shard.rows for shard in manifest.shards) == len(rows_of("out"))
    assert all(shard.row_groups == [] for shard in manifest.shards if shard.rows == 0)


def test_row_groups_lie_where_the_manifest_says(corpus, make_config, run):
    manifest = run(make_config())
    for shard in manifest.shards:
        assert [g.rows for g in shard.row_groups[:-1]] == [16] * (len(shard.row_groups) - 1)
        end = 4
        for group in shard.row_groups:
            assert group.byte_offset == end
            end += group.bytes
        assert pa.memory_map(f"out/{shard.file}").size() == shard.bytes > end


def source(name, path):
    """One text source."""
    return {"name": name, "type": "text", "path": path}


@pytest.mark.parametrize("name", ["manifest.json", "prepare.json"])
def test_nothing_in_the_output_names_the_machine(name, corpus, make_config, run, tmp_path):
    run(make_config(str(tmp_path / "absolute")))
    assert str(tmp_path) not in (tmp_path / "absolute" / name).read_text()


def test_a_sample_of_the_documents_is_chosen_by_content(corpus, make_config, run, documents_of):
    def documents(output, fraction):
        source = {"name": "all", "type": "text", "path": "corpus/*.txt"}
        config = make_config(
            output,
            sources=[source | {"sample_fraction": fraction}],
            evaluation_fraction=0.0,
            sequence_len=4096,
        )
        (record,) = run(config).sources
        left = record.dropped_documents.get("left out by sample_fraction", 0)
        assert left + len(documents_of(output)) == record.documents
        return set(documents_of(output))

    texts = {path.read_text() for path in corpus.glob("*.txt")}
    half, fifth = documents("half", 0.5), documents("fifth", 0.2)
    assert fifth < half < texts
    assert 0.35 * len(texts) < len(half) < 0.65 * len(texts)
    (corpus / "0.txt").write_text("added before all the others")
    assert documents("more", 0.5) - {"added before all the others"} == half
