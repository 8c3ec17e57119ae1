"""Which documents share a row, and what becomes of those that fit into none."""

import io
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from headrace.dataprep.prepare import prepare
from headrace.dataprep.rows.best_fit import RoomSet, best_fit_rows
from headrace.dataprep.rows.overlong import drop_tail, fit_samples
from headrace.dataprep.rows.packing import pack_samples
from headrace.dataprep.text.sample import Sample
from headrace.jobs.console.inspection import inspect
from headrace.jobs.console.reporter import ConsoleReporter
from headrace.schemas.errors import DataError

TRUNCATED = "overlong document truncated"
DROPPED = "overlong document dropped"
POLICIES = ("split", "truncate", "drop")


@st.composite
def lengths_and_row(draw, longest=1.0):
    """Lengths of documents, up to `longest` rows, and the tokens of a row."""
    sequence_len = draw(st.sampled_from([8, 13, 64, 1000, 1024, 5000]))
    length = st.integers(1, int(longest * sequence_len))
    few = draw(st.lists(length, min_size=1, max_size=4))  # equal lengths are frequent
    edges = [size for size in (sequence_len, sequence_len + 1) if size <= longest * sequence_len]
    one = st.sampled_from([*few, *edges]) | length
    return draw(st.lists(one, min_size=1, max_size=60)), sequence_len


def numbered(lengths):
    """Documents of these lengths in which no token comes twice."""
    return np.split(np.arange(sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])


def naive_best_fit(lengths, sequence_len):
    """The row of each document, by trying every row for each."""
    filled, last_filled, rows = [], [], {}
    for step, document in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        fitting = [r for r, full in enumerate(filled) if full + lengths[document] <= sequence_len]
        if not fitting:
            fitting = [len(filled)]
            filled.append(0)
            last_filled.append(0)
        row = max(fitting, key=lambda row: (filled[row], last_filled[row]))
        filled[row] += lengths[document]
        last_filled[row] = step
        rows[document] = row
    return [rows[document] for document in range(len(lengths))]


@settings(deadline=None, max_examples=200)
@given(lengths_and_row())
def test_best_fit_places_documents_as_trying_every_row_does(case):
    lengths, sequence_len = case
    found = best_fit_rows(np.array(lengths), sequence_len).tolist()
    assert found == naive_best_fit(lengths, sequence_len)


@settings(deadline=None, max_examples=100)
@given(lengths_and_row())
def test_no_two_rows_of_best_fit_would_fit_into_one(case):
    lengths, sequence_len = case
    filled = np.bincount(best_fit_rows(np.array(lengths), sequence_len), weights=lengths)
    assert 0 < filled.min() <= filled.max() <= sequence_len
    assert all(first + second > sequence_len for first, second in combinations(filled, 2))


@settings(deadline=None)
@given(st.sets(st.integers(1, 1 << 20), min_size=1, max_size=40), st.data())
def test_the_least_room_that_is_enough_is_found_among_a_million(rooms, data):
    found = RoomSet(1 << 20)
    for room in rooms:
        found.add(room)
    for room in data.draw(st.lists(st.sampled_from(sorted(rooms)), unique=True)):
        found.remove(room)
        rooms.remove(room)
    for wanted in data.draw(st.lists(st.integers(1, 1 << 20) | st.sampled_from(range(1, 3000)))):
        assert found.least_from(wanted) == min((r for r in rooms if r >= wanted), default=None)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@settings(deadline=None, max_examples=60)
@given(case=lengths_and_row())
def test_rows_hold_every_document_once_and_whole(packing, case):
    lengths, sequence_len = case
    documents = numbered(lengths)
    packed = pack_samples([Sample(ids) for ids in documents], packing, sequence_len)
    ids, document_lengths = packed.input_ids, packed.document_lengths
    assert packed.loss_mask.null_count == len(ids), "every token is trained"
    found = []
    for row, pieces in zip(ids.to_pylist(), document_lengths.to_pylist(), strict=True):
        assert sum(pieces) == len(row) <= sequence_len
        assert len(pieces) == 1 or packing == "best_fit"
        parts = [part.tolist() for part in np.split(np.array(row), np.cumsum(pieces)[:-1])]
        assert parts == sorted(parts), "the documents of a row keep their order"
        found += parts
    assert sorted(found) == [ids.tolist() for ids in documents]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit", "none"])
@settings(deadline=None, max_examples=60)
@given(case=lengths_and_row(), data=st.data())
def test_each_token_keeps_its_mark_and_wholly_trained_rows_have_no_mask(packing, case, data):
    lengths, sequence_len = case
    documents = numbered(lengths)
    kinds = data.draw(
        st.lists(st.sampled_from("nota"), min_size=len(lengths), max_size=len(lengths))
    )
    masks = {"n": lambda ids: None, "o": lambda ids: ids % 3 == 0, "t": lambda ids: ids >= 0}
    masks["a"] = lambda ids: ids < 0
    samples = [Sample(ids, masks[kind](ids)) for ids, kind in zip(documents, kinds, strict=True)]
    marks = np.concatenate(
        [
            ids >= 0 if s.trained is None else s.trained
            for ids, s in zip(documents, samples, strict=True)
        ]
    )
    packed = pack_samples(samples, packing, sequence_len)
    packed.loss_mask.validate(full=True)
    for ids, mask in zip(packed.input_ids.to_pylist(), packed.loss_mask.to_pylist(), strict=True):
        expected = marks[ids].tolist()
        assert mask == (None if all(expected) else expected)
    assert sum(sample.trained_tokens for sample in samples) == marks.sum()


@pytest.mark.parametrize("overlong", POLICIES)
@settings(deadline=None, max_examples=60)
@given(case=lengths_and_row(longest=3.0))
def test_an_overlong_document_is_split_truncated_or_dropped_and_counted(overlong, case):
    lengths, sequence_len = case
    documents = numbered(lengths)
    fitted = fit_samples([Sample(ids, ids % 3 == 0) for ids in documents], sequence_len, overlong)
    assert all(np.array_equal(s.trained, s.ids % 3 == 0) for s in fitted.samples)
    kept_documents = [sample.ids for sample in fitted.samples]
    long = [length for length in lengths if length > sequence_len]
    kept = {
        "split": np.concatenate(documents),
        "truncate": np.concatenate([ids[:sequence_len] for ids in documents]),
        "drop": np.concatenate([ids for ids in documents if len(ids) <= sequence_len] or [[]]),
    }
    dropped = {
        "split": ({}, {}),
        "truncate": ({TRUNCATED: sum(long) - len(long) * sequence_len}, {}),
        "drop": ({DROPPED: sum(long)}, {DROPPED: len(long)}),
    }
    assert np.array_equal(np.concatenate([*kept_documents, []]), kept[overlong])
    assert all(0 < len(ids) <= sequence_len for ids in kept_documents)
    short = [len(ids) for ids in kept_documents if len(ids) < sequence_len]
    assert overlong != "split" or len(short) == sum(length % sequence_len > 0 for length in lengths)
    assert (fitted[1], fitted[2]) == (dropped[overlong] if long else ({}, {}))


@settings(deadline=None, max_examples=60)
@given(case=lengths_and_row(longest=2.0))
def test_dropping_the_tail_keeps_all_before_it_in_order(case):
    lengths, row_len = case
    documents = numbered(lengths)
    fitted = drop_tail([Sample(ids, ids % 3 == 0) for ids in documents], row_len)
    ids = np.concatenate(documents)
    kept = len(ids) - len(ids) % row_len
    found = np.concatenate([*(sample.ids for sample in fitted.samples), []])
    assert np.array_equal(found, ids[:kept])
    assert all(np.array_equal(s.trained, s.ids % 3 == 0) for s in fitted.samples)
    assert sum(fitted.tokens_dropped.values()) == len(ids) - kept
    whole = sum(fitted.documents_dropped.values())
    assert len(fitted.samples) + whole == len(documents)


def test_a_source_of_which_every_document_is_dropped_stops_the_run(corpus, make_config, run):
    said = (
        r"^source \"mill\": none of its 200 documents is left \(overlong document dropped: 200\);"
    )
    with pytest.raises(DataError, match=said):
        run(make_config(packing="best_fit", overlong="drop", sequence_len=8))
    assert not Path("out/manifest.json").exists()


def test_the_closing_table_and_inspect_show_fill_and_what_was_dropped(corpus, make_config):
    config = make_config(packing="none", overlong="drop", sequence_len=128)
    closing, looking = (Console(file=io.StringIO(), width=200) for _ in range(2))
    manifest = prepare(config, 1, ConsoleReporter(closing))
    inspect(Path("out"), 1, looking)
    (source,) = manifest.sources
    dropped = manifest.ledger.tokens_dropped[DROPPED]
    for console in (closing, looking):
        shown = console.file.getvalue()
        assert f"{100 * source.tokens / (128 * source.rows):.1f}%" in shown
        assert f"{DROPPED} ({200 - source.rows} documents)" in shown
        assert f"{dropped:,}" in shown


def test_a_label_on_the_first_token_alone_trains_nothing():
    ids, first = np.arange(3), np.array([True, False, False])
    assert not Sample(ids, first).is_trained
    assert not Sample(ids[:1]).is_trained
    assert Sample(ids, np.array([False, False, True])).is_trained
    assert not Sample(ids, None, ids, first).is_trained
