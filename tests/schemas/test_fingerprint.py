"""Fingerprints and derived seeds never change between machines, Python versions or releases."""

import hashlib
from itertools import islice

from headrace.schemas.fingerprint import (
    derive_seed,
    derive_seed_array,
    derive_seeds,
    file_sha256,
    fingerprint,
)
from headrace.schemas.shards.manifest import Manifest, SourceRecord

EARLIER_DIGEST = "6c51b753f66d2f7d058558782c08b57efe7a26d5493338c3c73c60dff38af133"


def test_derived_seeds_are_these_for_ever():
    assert derive_seed(0) == 206174973315766160
    assert derive_seed(0, "rows") == 12193298429795350837
    assert derive_seed(0, "rows", 1) == 2576732863426940284
    assert derive_seed(1, "rows", 1) == 18277838272613167744


def test_many_seeds_of_one_purpose_are_those_derived_one_by_one():
    many = list(islice(derive_seeds(7, "row", "mill", 3), 300))
    assert many == [derive_seed(7, "row", "mill", 3, number) for number in range(300)]
    assert derive_seed_array(7, "row", "mill", 3, count=300).tolist() == many
    assert not len(derive_seed_array(7, "row", "mill", 3, count=0))


def test_seeds_of_different_purposes_differ():
    purposes = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        ("a", "b", "c"),
        ("1",),
        (1,),
        (),
        ("",),
        (0, 1),
    ]
    assert len({derive_seed(7, *purpose) for purpose in purposes}) == len(purposes)


def test_a_fingerprint_ignores_the_order_of_keys_but_not_of_lists():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert fingerprint("é") == hashlib.sha256('"é"'.encode()).hexdigest()


def test_a_files_hash_is_that_of_its_bytes(tmp_path):
    content = bytes(range(256)) * 5000  # more than one chunk
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_run_knows_its_shards_again_after_fields_were_added_to_the_manifest():
    """The digest is that of commit e920778, which knew no notes."""
    source = SourceRecord(
        name="a",
        documents=1,
        rejected_documents=0,
        rows=0,
        tokens=0,
        trained_tokens=0,
        document_length_quantiles={},
    )
    manifest = Manifest.model_construct(sources=[source], shards=[], kind="causal")
    assert fingerprint([manifest.identity()]) == EARLIER_DIGEST
    noted = source.model_copy(update={"notes": {"lost": 1}})
    other = manifest.model_copy(update={"sources": [noted]})
    assert fingerprint([other.identity()]) != EARLIER_DIGEST
