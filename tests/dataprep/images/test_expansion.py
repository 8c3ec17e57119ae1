"""Texts of pictures in place of their markers, and where characters and tokens are then."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headrace.dataprep.formats.picture_template import Expansion
from headrace.dataprep.text.tokens import Located

MARKER = "<|pic|>"
pieces = st.lists(st.text("ab \n", max_size=6), min_size=1, max_size=6)
inner = st.text("xyz", min_size=1, max_size=30)


@given(pieces, st.data())
def test_characters_and_tokens_find_their_places_again(parts, data):
    texts = [data.draw(inner) for _ in parts[1:]]
    old = MARKER.join(parts)
    expansion = Expansion(old, MARKER, texts)
    assert [expansion.text[a:b] for a, b in expansion.spans] == texts
    plain = iter(expansion.text)
    assert "".join(plain) == parts[0] + "".join(
        text + part for text, part in zip(texts, parts[1:], strict=True)
    )
    inside = np.zeros(len(old) + 1, bool)
    for start in expansion.starts:
        inside[start : start + len(MARKER)] = True
    for place in np.flatnonzero(~inside[:-1]).tolist():
        assert expansion.text[expansion.place(place)] == old[place]
    assert expansion.place(len(old)) == len(expansion.text)
    for start, (begin, end) in zip(expansion.starts, expansion.spans, strict=True):
        assert expansion.span((start, start + len(MARKER))) == (begin, end)

    letters = np.arange(len(expansion.text), dtype=np.int32)  # a token for each character
    back = expansion.before(Located(letters, letters, letters + 1))
    for new, (start, end) in enumerate(zip(back.starts, back.ends, strict=True)):
        picture = next((k for k, (a, b) in enumerate(expansion.spans) if a <= new < b), None)
        if picture is None:
            assert (old[start:end], end - start) == (expansion.text[new], 1)
        else:
            assert start == expansion.starts[picture]
            assert new + 1 < expansion.spans[picture][1] or end == start + len(MARKER)
