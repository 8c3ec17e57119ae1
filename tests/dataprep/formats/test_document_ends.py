"""Tokens around documents, added to many at once."""

import itertools

import numpy as np
import pytest

from headrace.dataprep.formats.document_ends import Ends, surround, surround_all

DOCUMENTS = [[], [5], [1], [2], [1, 2], [2, 1], [1, 7, 2], [], [9, 9, 9]]


def expected(ends, ids):
    """What a document becomes, said once more."""
    if not ids:
        return []
    before = [1] if ends.bos == 1 and ids[0] != 1 else []
    after = [2] if ends.eos == 2 and ids[-1] != 2 else []
    return [*ends.prefix, *before, *ids, *after, *ends.suffix]


@pytest.mark.parametrize(
    ("bos", "eos", "prefix", "suffix"),
    list(itertools.product([None, 1], [None, 2], [[], [3, 4]], [[], [6]])),
)
def test_documents_get_their_ends_alone_as_together(bos, eos, prefix, suffix):
    ends = Ends(bos, eos, prefix, suffix, False)
    encoded = [np.array(ids, np.uint32) for ids in DOCUMENTS]
    found = surround_all(ends, encoded)
    assert [ids.tolist() for ids in found] == [expected(ends, ids) for ids in DOCUMENTS]
    assert all(ids.dtype == np.int32 for ids in found)
    assert [surround(ends, ids).tolist() for ids in DOCUMENTS] == [ids.tolist() for ids in found]


def test_no_documents_are_none():
    assert surround_all(Ends(1, 2, [], [], False), []) == []
