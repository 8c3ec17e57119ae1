"""A finished directory is reused for what it was made of, and for nothing else."""

import os
from pathlib import Path

import pytest

from headrace.schemas.errors import DataError

SOURCES = [{"name": "mill", "type": "documents", "path": "in.jsonl"}]


def prepared(make_config, run, **changes):
    return run(make_config(sources=SOURCES, evaluation_fraction=0.0, **changes))


@pytest.mark.parametrize("seconds", [2_000_000_000, 1_000_000_000])
def test_an_input_of_other_content_and_equal_size_is_named(seconds, corpus, make_config, run):
    path = Path("in.jsonl")
    path.write_text('{"text": "the cat"}\n')
    first = prepared(make_config, run)
    path.write_text('{"text": "the dog"}\n')
    os.utime(path, (seconds, seconds))
    with pytest.raises(
        DataError, match=r"^out: finished before in\.jsonl was changed; set another"
    ):
        prepared(make_config, run)
    path.write_text('{"text": "the cat"}\n')
    assert prepared(make_config, run) == first


def test_the_keys_that_differ_are_named(corpus, make_config, run):
    Path("in.jsonl").write_text('{"text": "the cat"}\n')
    prepared(make_config, run)
    with pytest.raises(DataError, match=r"another config \(other: seed, sequence_len\); set"):
        prepared(make_config, run, seed=7, sequence_len=96)


def test_a_source_of_which_all_is_refused_says_why(corpus, make_config, run):
    Path("in.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    with pytest.raises(
        DataError, match=r"all 2 documents of in\.jsonl are refused \(missing field: 2\)"
    ):
        prepared(make_config, run, max_reject_fraction=1.0)
