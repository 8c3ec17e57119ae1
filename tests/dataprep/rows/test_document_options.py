"""Options of documents and rows, and that with any of them no token goes missing unnamed."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headrace.dataprep.prepare import prepare
from headrace.dataprep.shards.verify import verify
from headrace.schemas.errors import DataError, HeadraceError
from headrace.schemas.prepare.prepare_config import PrepareConfig

PREFIX = 310  # the last id of the vocabulary
IDS = 300


@st.composite
def id_corpora(draw):
    """Documents in which no id comes twice, each id trained or not, and a config for them."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    trained = draw(st.lists(st.booleans(), min_size=IDS, max_size=IDS))
    packing = draw(st.sampled_from(["concatenate", "best_fit", "none"]))
    changes = {
        "packing": packing,
        "sequence_len": draw(st.integers(8, 30)),
        "evaluation_fraction": draw(st.sampled_from([0.0, 0.3])),
        "sequence_prefix": draw(st.sampled_from([[], [PREFIX], [PREFIX, PREFIX]])),
        "block_bytes": draw(st.sampled_from([1024, 1 << 20])),
        "shards": draw(st.integers(1, 3)),
    }
    if packing == "concatenate":
        changes["drop_tails"] = draw(st.booleans())
    else:
        changes["overlong"] = draw(st.sampled_from(["split", "truncate", "drop"]))
    masked = draw(st.lists(st.integers(0, IDS), max_size=3))
    return lengths, trained, changes, masked


def number_documents(lengths):
    """Documents of ascending ids, as long as there are ids."""
    documents, start = [], 0
    for length in lengths:
        if start + length <= IDS:
            documents.append(list(range(start, start + length)))
            start += length
    return documents


@settings(deadline=None, max_examples=30)
@given(case=id_corpora())
def test_every_id_is_in_one_row_with_its_mark_or_dropped_by_name(case, tokenizer_folder, read_rows):
    lengths, trained, changes, masked = case
    documents = number_documents(lengths)
    folder = Path(tempfile.mkdtemp())
    lines = [
        json.dumps({"input_ids": ids, "loss_mask": [trained[i] for i in ids]}) for ids in documents
    ]
    (folder / "in.jsonl").write_text("\n".join(lines))
    source = {"name": "a", "type": "pretokenized", "path": f"{folder}/in.jsonl"}
    values = {"output": f"{folder}/out", "tokenizer": str(tokenizer_folder)}
    values |= {"sources": [source | {"mask_tokens": masked}], **changes}
    try:
        manifest = prepare(PrepareConfig.model_validate(values), 1)
        assert verify(folder / "out") == []
        rows = read_rows(folder / "out")
    except DataError as error:  # nothing is left to write
        assert "documents" in str(error) or "every document" in str(error)
        return
    finally:
        shutil.rmtree(folder)
    prefix = changes["sequence_prefix"]
    seen = []
    for row in rows:
        ids, mask = row["input_ids"], row["loss_mask"]
        assert len(ids) <= changes["sequence_len"]
        assert ids[: len(prefix)] == prefix
        marks = [True] * len(ids) if mask is None else mask
        assert all(marks[: len(prefix)])
        seen += ids[len(prefix) :]
        for token, mark in list(zip(ids, marks, strict=True))[len(prefix) :]:
            assert mark == (trained[token] and token not in masked)
        start = 0
        for index, length in enumerate(row["document_lengths"]):
            piece = ids[start : start + length][len(prefix) if index == 0 else 0 :]
            assert any(
                piece == document[i : i + len(piece)]
                for document in documents
                for i in range(len(document))
            ), "a piece is a stretch of one document"
            start += length
    dropped = sum(manifest.ledger.tokens_dropped.values())
    assert len(seen) == len({*seen}), "no id comes twice"
    assert len(seen) + dropped == sum(map(len, documents))
    names = {"nothing in it is trained", "tail of a block dropped"}
    names |= {"overlong document truncated", "overlong document dropped"}
    assert manifest.ledger.tokens_dropped.keys() <= names


@pytest.fixture(scope="session")
def read_rows():
    import pyarrow.parquet as pq

    def read_rows(folder):
        paths = sorted(folder.glob("*.parquet"))
        return [row for path in paths for row in pq.read_table(path).to_pylist()]

    return read_rows


def text_source(**options):
    return [{"name": "a", "type": "text", "path": "corpus/000.txt", **options}]


ENDS = {
    "BOS and EOS": ({}, "0 stone</s>"),
    "none": ({"document_prefix": "", "document_suffix": ""}, "0 stone"),
    "texts": ({"document_prefix": "<s>", "document_suffix": "mill"}, "<s>0 stonemill"),
    "ids": ({"document_prefix": 1, "document_suffix": [0, 1]}, "</s>0 stone<s></s>"),
    "a space": ({"add_prefix_space": True}, " 0 stone</s>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_document_stands_between_its_ends(
    name, corpus, make_config, run, rows_of, tokenizer_folder
):
    options, expected = ENDS[name]
    (corpus / "000.txt").write_text("0 stone")
    run(make_config(sources=text_source(**options), evaluation_fraction=0.0))
    (row,) = rows_of("out")
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert tokenizer.decode(row["input_ids"], skip_special_tokens=False) == expected


def test_each_source_says_whether_special_tokens_are_parsed(corpus, make_config, run, rows_of):
    (corpus / "000.txt").write_text("a<s>b")
    for parse, count in ((True, 1), (False, 0), (None, 0)):
        sources = text_source(parse_special_tokens=parse)
        run(make_config(str(parse), sources=sources, evaluation_fraction=0.0))
        assert rows_of(str(parse))[0]["input_ids"].count(0) == count


def test_masked_tokens_may_be_texts_and_are_not_trained(corpus, make_config, run, rows_of):
    (corpus / "000.txt").write_text("0 stone")
    for tokens in (["</s>"], True):
        sources = text_source(mask_tokens=tokens)
        manifest = run(make_config(str(tokens), sources=sources, evaluation_fraction=0.0))
        (row,) = rows_of(str(tokens))
        assert row["loss_mask"] == [True] * (len(row["input_ids"]) - 1) + [False]
        assert manifest.sources[0].trained_tokens == len(row["input_ids"]) - 1


def test_rows_carry_the_control_class_of_their_source(corpus, make_config, run, rows_of):
    sources = [
        {"name": str(c), "type": "text", "path": f"corpus/0{i}*.txt", "control_class": c}
        for i, c in enumerate([-1, 0, 1, None])
    ]
    run(make_config(sources=sources))
    found = {(row["source"], row["control_class"]) for row in rows_of("out")}
    assert found == {("-1", -1), ("0", 0), ("1", 1), ("None", None)}


WRONG = {
    "an id that does not exist": (
        {"sources": text_source(document_suffix=999)},
        "token id 999 of the config: .* has ids 0 to 310; correct it",
    ),
    "a prefix that fills the row": (
        {"sequence_prefix": [1] * 64},
        "sequence_prefix has 64 tokens, which leaves no room in a row",
    ),
    "tails of whole documents": (
        {"packing": "none", "drop_tails": True},
        'only packing = "concatenate" cuts rows at their length',
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_that_cannot_be_are_refused_before_the_work(name, corpus, make_config, run):
    changes, message = WRONG[name]
    with pytest.raises((HeadraceError, ValueError), match=message):
        run(make_config(**changes))
    assert not Path("out").exists()
