"""A faster tokenizer changes nothing but the time, or the run stops."""

from pathlib import Path

import pytest

from headrace.dataprep.text import fast_tokenizer
from headrace.schemas.errors import ConfigError, DataError

FAST = {"tokenizer_backend": "fastokens"}


def test_the_directory_is_the_same_to_the_byte(corpus, make_config, run, snapshot):
    (corpus / "special.txt").write_text("</s> stone <s>\u00a0mill\u0301 " * 50)
    for number, parse in enumerate((False, True)):
        run(make_config(f"plain{number}", parse_special_tokens=parse))
        run(make_config(f"fast{number}", parse_special_tokens=parse, **FAST))
        assert snapshot(f"fast{number}") == snapshot(f"plain{number}")
    assert snapshot("fast0") != snapshot("fast1")


def wrong_for(word, encode):
    """A tokenizer whose ids of texts with some word end with another one."""

    def encode_wrongly(tokenizer, texts, *options):
        for text, ids in zip(texts, encode(tokenizer, texts, *options), strict=True):
            yield ids[:-1] if word in text else ids

    return encode_wrongly


def test_ids_that_differ_in_a_block_stop_the_run(corpus, make_config, run, monkeypatch):
    (corpus / "100.txt").write_text("weir")  # begins a block
    monkeypatch.setattr(fast_tokenizer, "encode", wrong_for("weir", fast_tokenizer.encode))
    with pytest.raises(DataError) as caught:
        run(make_config(block_bytes=1024, **FAST))
    assert str(caught.value).endswith(
        "tokenizer.json: fastokens gives other ids than tokenizers from token 3 of 'weir' on; "
        'set tokenizer_backend = "tokenizers"'
    )


def test_ids_that_differ_in_hard_texts_stop_the_run_before_it_begins(
    corpus, make_config, run, monkeypatch
):
    monkeypatch.setattr(fast_tokenizer, "encode", wrong_for("½", fast_tokenizer.encode))
    with pytest.raises(DataError, match=r"from token \d+ of '1234567890 3.14159"):
        run(make_config(**FAST))
    assert not Path("out").exists()


def test_it_is_the_default_where_it_is_installed_and_agrees(
    corpus, make_config, run, monkeypatch, snapshot
):
    asked = []
    real = fast_tokenizer.encode
    monkeypatch.setattr(fast_tokenizer, "encode", lambda *a: asked.append(1) or real(*a))
    run(make_config("fast"))
    assert asked
    asked.clear()
    run(make_config("named", tokenizer_backend="tokenizers"))
    assert not asked
    monkeypatch.setattr(fast_tokenizer, "encode", wrong_for("½", real))
    run(make_config("differs"))
    monkeypatch.setattr(fast_tokenizer, "find_spec", lambda name: None)
    run(make_config("missing"))
    assert snapshot("fast") == snapshot("named") == snapshot("differs") == snapshot("missing")


def test_a_missing_library_is_named_with_its_remedy(corpus, make_config, run, monkeypatch):
    monkeypatch.setattr(fast_tokenizer, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run in a clone of Headrace: pip install '\.\[fast\]'$"):
        run(make_config(**FAST))
