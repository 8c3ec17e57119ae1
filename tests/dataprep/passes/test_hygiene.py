"""What is left out of a corpus, and why: filters, exact and near duplicates; and a stable split."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.dataprep.input.records import Reject
from headrace.dataprep.passes import dedup_pass, duplicate_keys
from headrace.dataprep.passes.duplicate_keys import EXACT, NEAR, band_shape, hash_windows, normalize
from headrace.dataprep.rows.encoded_spool import EncodedBlock, read_encoded, write_encoded
from headrace.dataprep.text.row_format import Document
from headrace.dataprep.text.sample import Sample
from headrace.schemas.errors import ConfigError
from headrace.schemas.prepare.filter_config import DeduplicateConfig

WORDS = "water wheel mill race stone grain flour river gate sluice timber axle gear".split()
BOTH = {"exact": True, "near": True}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Texts as a file of JSONL."""
    monkeypatch.chdir(tmp_path)

    def write(texts, name="corpus.jsonl"):
        Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    return write


@pytest.fixture
def prepare_texts(write, make_config, run, documents_of):
    """The texts that are left of some texts, and the manifest."""

    def prepare_texts(texts, output="out", workers=1, budgets=None, **changes):
        write(texts)
        source = {"name": "mill", "type": "documents", "path": "corpus.jsonl"}
        changes = {"sources": [source], "packing": "none", "sequence_len": 4096} | changes
        manifest = run(make_config(output, **changes), workers, **(budgets or {}))
        return documents_of(output), manifest

    return prepare_texts


def sentence(seed, words=40):
    """Words in an order of their own."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + str(rng.randrange(100)) for _ in range(words))


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"min_characters": 5}, [" mill ", "stone 12", "mill\nmill\nmill", "x" * 40]),
        ({"max_characters": 8}, ["é1", " mill ", "stone 12"]),
        ({"min_tokens": 11}, ["x" * 40]),
        ({"max_tokens": 10}, ["é1", " mill ", "stone 12", "mill\nmill\nmill"]),
        ({"min_alphabetic_share": 0.6}, [" mill ", "stone 12", "mill\nmill\nmill", "x" * 40]),
        ({"max_repeated_line_share": 0.5}, ["é1", " mill ", "stone 12", "x" * 40]),
        ({"max_compressible_share": 0.4}, ["é1", " mill ", "stone 12", "mill\nmill\nmill"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_filter_leaves_out_what_it_says_under_its_name(filters, kept, prepare_texts):
    texts = ["é1", " mill ", "stone 12", "mill\nmill\nmill", "x" * 40]
    found, manifest = prepare_texts(texts, filters=filters)
    assert found == sorted(kept)
    reason = f"filter {next(iter(filters))}"
    assert manifest.sources[0].dropped_documents == {reason: len(texts) - len(kept)}
    assert list(manifest.ledger.tokens_dropped) == [reason]
    assert manifest.ledger.difference() == 0


def test_a_document_is_dropped_by_the_first_filter_alone(prepare_texts):
    _, manifest = prepare_texts(
        ["stone", "1", "22"], filters={"min_characters": 2, "min_alphabetic_share": 0.5}
    )
    names = {"filter min_characters": 1, "filter min_alphabetic_share": 1}
    assert manifest.sources[0].dropped_documents == names
    assert manifest.ledger.tokens_dropped == {
        "filter min_characters": 2,  # with </s>
        "filter min_alphabetic_share": 3,
    }


def test_limits_that_no_document_meets_are_refused(make_config):
    with pytest.raises(ValueError, match="min_tokens = 5 is more than max_tokens = 4; no document"):
        make_config(filters={"min_tokens": 5, "max_tokens": 4})


def test_of_documents_that_differ_in_case_space_or_form_the_first_stays(prepare_texts):
    texts = [
        "Stone  mill",
        "a\u0301xle",
        "STONE\nmill ",
        "\u00e1xle",
        "stonemill",
        "\ufb02our",
        "flour",
    ]
    found, manifest = prepare_texts(texts, deduplicate={"exact": True}, evaluation_fraction=0)
    assert found == sorted(["Stone  mill", "a\u0301xle", "stonemill", "\ufb02our"])
    assert manifest.sources[0].dropped_documents == {"exact duplicate": 3}
    assert manifest.sources[0].documents == 7


def test_the_first_source_keeps_what_both_have(write, make_config, run):
    write(["axle", "mill"], "first.jsonl")
    write(["gear", "MILL", "axle"], "second.jsonl")
    sources = [
        {"name": name, "type": "documents", "path": f"{name}.jsonl"} for name in ("second", "first")
    ]
    manifest = run(make_config(sources=sources[::-1], deduplicate={"exact": True}))
    dropped = {source.name: source.dropped_documents for source in manifest.sources}
    assert dropped == {"first": {}, "second": {"exact duplicate": 2}}


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(st.text("aA \n1", min_size=1, max_size=4), min_size=1, max_size=40))
def test_what_stays_is_what_a_dictionary_would_keep(texts, prepared_at_once):
    kept = {}
    for text in texts:
        kept.setdefault(" ".join(text.lower().split()), text)
    assert prepared_at_once(texts) == sorted(kept.values())


@pytest.fixture(scope="module")
def prepared_at_once(tokenizer_folder, tmp_path_factory):
    """Exact deduplication of many small blocks and parts, for many examples."""

    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    from headrace.dataprep.prepare import prepare
    from headrace.dataprep.work.budgets import Budgets
    from headrace.schemas.prepare.prepare_config import PrepareConfig

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))

    def prepared_at_once(texts):
        folder = tmp_path_factory.mktemp("example")
        corpus = folder / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config = {
            "output": str(folder / "out"),
            "tokenizer": str(tokenizer_folder),
            "packing": "none",
            "shards": 1,
            "evaluation_fraction": 0,
            "block_bytes": 1024,
            "deduplicate": {"exact": True},
            "sources": [{"name": "a", "type": "documents", "path": str(corpus)}],
        }
        prepare(PrepareConfig.model_validate(config), 1, budgets=Budgets(keys_in_part=3))
        rows = pq.read_table(folder / "out" / "shard-00000.parquet")["input_ids"].to_pylist()
        return sorted(tokenizer.decode(ids) for ids in rows)

    return prepared_at_once


def corpus_with_copies():
    """Sixty texts; of each of the first ten another copy with one word more, further on."""
    texts = [sentence(seed, 80) for seed in range(60)]
    return texts + [f"{text} weir" for text in texts[:10]]


def test_similar_documents_are_dropped_and_others_are_not(prepare_texts):
    texts = corpus_with_copies()
    found, manifest = prepare_texts(texts, deduplicate={"near": True})
    assert found == sorted(texts[:60])
    assert manifest.sources[0].dropped_documents == {"near duplicate": 10}


def test_a_copy_of_a_copy_is_an_exact_duplicate_where_both_are_looked_for(prepare_texts):
    texts = corpus_with_copies()
    _, manifest = prepare_texts([*texts, texts[0], texts[65]], deduplicate=BOTH)
    assert manifest.sources[0].dropped_documents == {"near duplicate": 10, "exact duplicate": 2}


@pytest.mark.parametrize("similarity", [0.7, 0.8, 0.9])
def test_the_share_of_similar_pairs_that_are_found_follows_the_bands(similarity):
    bands, rows = band_shape(similarity, 128)
    assert bands * rows <= 128
    rng = random.Random(1)
    config = DeduplicateConfig(near=True, similarity=similarity)
    for words_changed in (2, 8, 20):
        found, expected = [], []
        for seed in range(60):
            words = sentence(seed, 120).split()
            changed = list(words)
            for place in rng.sample(range(len(words)), words_changed):
                changed[place] = f"weir{rng.randrange(10**6)}"
            pair = [" ".join(words), " ".join(changed)]
            left, right = (set(hash_windows(normalize(text)).tolist()) for text in pair)
            jaccard = len(left & right) / len(left | right)
            expected.append(1 - (1 - jaccard**rows) ** bands)
            one, two = (duplicate_keys.document_keys(config, [0], [text]) for text in pair)
            found.append(bool(np.isin(one["key"], two["key"]).any()))
        deviation = 3.5 * (0.25 / len(found)) ** 0.5
        assert abs(np.mean(found) - np.mean(expected)) < deviation


def test_bytes_do_not_depend_on_workers_or_on_how_much_is_searched_at_once(prepare_texts, snapshot):
    texts = corpus_with_copies()
    random.Random(2).shuffle(texts)
    settings = {"deduplicate": BOTH, "block_bytes": 8192}
    _, manifest = prepare_texts(texts, "one", **settings)
    assert manifest.sources[0].dropped_documents == {"near duplicate": 10}
    prepare_texts(texts, "two", workers=2, **settings)
    prepare_texts(texts, "parts", budgets={"keys_in_part": 100}, **settings)
    assert snapshot("one") == snapshot("two") == snapshot("parts")


def test_a_corpus_of_copies_has_one_key_a_task_to_compare(prepare_texts, monkeypatch):
    sizes = []
    gather = dedup_pass.gather
    monkeypatch.setattr(
        dedup_pass,
        "gather",
        lambda *arguments: [sizes.append(len(keys := gather(*arguments))), keys][1],
    )
    found, manifest = prepare_texts(
        ["mill stone"] * 500, deduplicate={"exact": True}, block_bytes=1024
    )
    assert found == ["mill stone"]
    assert manifest.sources[0].dropped_documents == {"exact duplicate": 499}
    assert sizes == [1] * len(sizes)
    assert len(sizes) > 5


def test_keys_of_different_kinds_and_bands_differ():
    keys = duplicate_keys.document_keys(DeduplicateConfig(**BOTH), [7], ["mill"])
    assert len(set(keys["key"])) == len(keys) == 1 + band_shape(0.8, 128)[0]
    assert list(keys["kind"]) == [EXACT] + [NEAR] * (len(keys) - 1)
    assert set(keys["document"]) == {7}


def test_a_missing_library_is_named_with_its_remedy(prepare_texts, monkeypatch):
    monkeypatch.setattr(duplicate_keys, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"run in a clone of Headrace: pip install '\.\[dedup\]'$"
    ):
        prepare_texts(["mill"], deduplicate={"near": True})
    prepare_texts(["mill", "stone"], deduplicate={"exact": True}, evaluation_fraction=0)


def test_documents_keep_their_split_when_others_are_added(
    write, make_config, run, tokenizer_folder, rows_of
):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    texts = [sentence(seed, 5) for seed in range(300)]
    more = [sentence(seed, 5) for seed in range(300, 700)]
    random.Random(3).shuffle(more)
    splits = {}
    for name, corpus in {"before": texts, "after": more[:200] + texts[::-1] + more[200:]}.items():
        write(corpus)
        source = {"name": "mill", "type": "documents", "path": "corpus.jsonl"}
        run(make_config(name, sources=[source], packing="none", sequence_len=512))
        splits[name] = {
            tokenizer.decode(row["input_ids"]): split
            for split in ("train", "evaluation")
            for row in rows_of(name, split)
        }
    assert set(splits["before"]) == set(texts)
    assert set(splits["after"]) == {*texts, *more}
    assert {text: splits["after"][text] for text in texts} == splits["before"]
    held_out = sum(split == "evaluation" for split in splits["after"].values())
    assert 40 < held_out < 105  # 70 of 700, within 4 standard deviations


def test_a_tokenized_block_comes_back_from_disk_as_it_was(tmp_path):
    ids, mask = np.arange(5, dtype=np.int32), np.array([True, False, True, True, False])
    documents = [
        Document("train", [Sample(ids), Sample(ids[:2], mask[:2])], {}),
        Document("evaluation", [], {"cut": 3, "filter min_tokens": 4}),
        Document(
            "train", [Sample(ids[:1], mask[:1], ids[1:], mask[1:]), Sample(ids[3:])], {"cut": 1}
        ),
    ]
    rejects = [Reject("a.jsonl", 3, "broken JSON", "column 1: \u00e9")]
    blocks = [
        EncodedBlock("mill", 2, 0, documents, rejects),
        EncodedBlock("mill", 2, 1, [], []),
        EncodedBlock("mill", 2, 2, documents[:1], []),
    ]
    write_encoded(tmp_path / "blocks", blocks)
    found = list(read_encoded(tmp_path / "blocks"))
    assert plain(found) == plain(blocks)


def plain(value):
    """Named tuples as tuples and arrays as lists with their types, so that they compare."""
    if isinstance(value, np.ndarray):
        return [value.dtype.name, value.tolist()]
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
