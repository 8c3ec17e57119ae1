"""`mix_sources`: documents of several sources in one row, the same by any engine."""

import functools
import json
from pathlib import Path

import pytest

from headrace.dataprep.shards.verify import verify
from headrace.dataprep.work.local_engine import LocalEngine
from headrace.schemas.errors import DataError


@pytest.fixture
def mixed_rows(mixed_config):
    """Two sources of the mixed config in common rows."""
    sources = mixed_config("unused").model_dump(mode="json", exclude_unset=True)["sources"][:2]
    return functools.partial(mixed_config, sources=sources, mix_sources=True, sequence_len=512)


def texts(documents):
    """Documents in an order that says nothing."""
    return sorted(map(tuple, documents))


def documents_in(rows):
    """The ids of all pieces of documents in rows."""
    for row in rows:
        start = 0
        for length in row["document_lengths"]:
            yield row["input_ids"][start : start + length]
            start += length


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_rows_hold_the_documents_of_all_sources(packing, mixed_rows, run, rows_of):
    whole = {"sequence_len": 4096, "packing": packing}  # so that no document is cut
    manifest = run(mixed_rows("mixed", **whole))
    apart = run(mixed_rows("apart", mix_sources=False, **whole))
    of_source = {}
    for split in ("train", "evaluation"):
        mixed, right = rows_of("mixed", split), rows_of("apart", split)
        assert {row["source"] for row in mixed} == {"mixed"}
        for row in right:
            for document in documents_in([row]):
                of_source.setdefault(tuple(document), row["source"])
        if packing == "best_fit":
            assert texts(documents_in(mixed)) == texts(documents_in(right))
        else:
            assert sum(len(row["input_ids"]) for row in mixed) == sum(
                len(row["input_ids"]) for row in right
            )
    if packing == "best_fit":
        both = [
            {of_source[tuple(document)] for document in documents_in([row])}
            for row in rows_of("mixed")
        ]
        assert sum(len(sources) == 2 for sources in both) > len(both) // 2
    (source,) = manifest.sources
    assert source.mixed_tokens == {s.name: s.tokens for s in apart.sources}
    assert source.documents == sum(s.documents for s in apart.sources)
    assert manifest.ledger.tokens_in == apart.ledger.tokens_in
    assert verify(Path("mixed")) == []
    refused = Path("mixed/rejects/rejects.jsonl").read_text()
    assert refused == Path("apart/rejects/rejects.jsonl").read_text()
    assert json.loads(refused)["source"] == "records"


def test_workers_and_kills_change_nothing(mixed_rows, run_on):
    changes = {"deduplicate": {"exact": True}, "max_rows": 40}
    right = run_on(None, mixed_rows("right", **changes), most_files=4)
    assert run_on(LocalEngine(2), mixed_rows("two", **changes), most_files=4) == right

    class Mortal:
        def run(self, function, items):
            for item in items:
                self.left -= 1
                if self.left < 0:
                    raise InterruptedError
                yield item, function(item)

    engine = Mortal()
    for engine.left in range(12, 600, 35):
        try:
            assert run_on(engine, mixed_rows("out", **changes), most_files=4) == right
            break
        except InterruptedError:
            assert not Path("out/manifest.json").exists()
    assert engine.left > 0


def test_spark_gives_the_same_bytes(mixed_rows, run_on, spark):
    changes = {"deduplicate": {"exact": True}, "packing": "best_fit", "block_bytes": 1 << 16}
    right = run_on(None, mixed_rows("right", **changes))
    assert run_on(spark, mixed_rows("spark", **changes)) == right


def test_a_source_is_limited_before_it_is_mixed(mixed_rows, run, rows_of):
    mill, records = mixed_rows.keywords["sources"]
    alone = {"mix_sources": False, "packing": "none", "deduplicate": {}, "evaluation_fraction": 0.0}
    run(mixed_rows("few", sources=[mill | {"max_rows": 20}], **alone))
    limited = {"name": "mill", "type": "pretokenized", "path": "few/shard-*.parquet"}
    manifest = run(mixed_rows("out", sources=[limited, records], deduplicate={}))
    taken = sum(len(row["input_ids"]) for row in rows_of("few"))
    assert manifest.sources[0].mixed_tokens["mill"] == taken


WRONG = {
    "a row a document": ({"packing": "none"}, {}, 'with packing = "none" each row is one document'),
    "classes": ({}, {"control_class": 1}, "a row has one control_class, and the sources have sev"),
    "limits": ({}, {"max_rows": 5}, 'source "mill": limits take whole rows'),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_share_rows_is_refused(name, mixed_rows):
    changes, source, message = WRONG[name]
    sources = mixed_rows.keywords["sources"]
    with pytest.raises(ValueError, match=message):
        mixed_rows("out", sources=[sources[0] | source, sources[1]], **changes)


def test_each_source_must_have_documents(mixed_rows, run, corpus):
    (corpus / "records.jsonl").write_text("\n")
    (corpus / "more.jsonl.gz").unlink()
    sources = mixed_rows.keywords["sources"]
    sources[1]["path"] = ["corpus/records.jsonl"]
    with pytest.raises(DataError, match=r'^source "records": no documents in'):
        run(mixed_rows("out", sources=sources))
