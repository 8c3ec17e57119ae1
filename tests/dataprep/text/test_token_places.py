"""Places of tokens worked out from their bytes are those that `tokenizers` gives."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors as post
from tokenizers.trainers import BpeTrainer

from headrace.dataprep.text import encoding
from headrace.dataprep.text.encoding import encode_located, locate_all
from headrace.dataprep.text.token_places import token_places
from headrace.dataprep.text.tokenizer import open_tokenizer
from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.schemas.fingerprint import file_sha256

TEXTS = [
    "the mill  wheel\n\n turns",
    "l'e\u0301t\u00e9 \u65e5\u672c\u8a9e \U0001f469\u200d\U0001f467 ",
]
PIECES = st.sampled_from(
    [" ", "\n", "\u00a0", "\u3000", "<|im_end|>", "e\u0301", "\u65e5", "\U0001f469\u200d\U0001f467"]
)
MIXED = st.lists(st.one_of(st.text(max_size=5), PIECES), max_size=12).map("".join)


def split(invert=False):
    """The cut before the bytes of newer models."""
    return pre_tokenizers.Split(r"\s+|\w+|[^\s\w]+", "isolated", invert)


def byte_level(normalizer=None, before=(), processor=None, prefix=False):
    """A small tokenizer in bytes."""
    tokenizer = Tokenizer(models.BPE())
    steps = [*before, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not before)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if before else steps[0]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    if processor is not None:
        tokenizer.post_processor = processor
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=False), " a b "])
    return tokenizer


def spec_of(tokenizer, folder):
    """A tokenizer as a run's workers are told of it."""
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    digest = file_sha256(path)
    return TokenizerSpec(
        str(path), digest, digest, tokenizer.get_vocab_size(), (), None, None, True
    )


KINDS = {
    "gpt-2": lambda: byte_level(processor=post.ByteLevel(trim_offsets=False)),
    "llama 3": lambda: byte_level(
        before=[split()], processor=post.Sequence([post.ByteLevel(trim_offsets=True)])
    ),
    "kept first space": lambda: byte_level(
        processor=post.ByteLevel(trim_offsets=True, add_prefix_space=True)
    ),
    "qwen": lambda: byte_level(normalizers.NFC(), [split()], post.ByteLevel(trim_offsets=False)),
    "no processor": byte_level,
}


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_those_of_the_library_for_any_text(kind, tmp_path):
    spec = spec_of(KINDS[kind](), tmp_path)
    assert token_places(spec, True) is not None

    @settings(deadline=None, max_examples=60)
    @given(st.lists(MIXED, min_size=1, max_size=4))
    def equal(texts):
        found = encode_located(spec, texts)
        expected = locate_all(open_tokenizer(spec, True), texts, False)
        for ours, theirs in zip(found, expected, strict=True):
            for left, right in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(left, right)

    equal()


def test_a_text_that_its_tokens_do_not_make_up_is_placed_by_the_library(tmp_path, monkeypatch):
    spec = spec_of(byte_level(normalizers.NFC()), tmp_path)
    asked = []
    real = encoding.locate_all
    monkeypatch.setattr(
        encoding,
        "locate_all",
        lambda tokenizer, texts, add: asked.extend(texts) or real(tokenizer, texts, add),
    )
    (_, found) = encode_located(spec, ["plain", "e\u0301 mill"])
    assert asked == ["e\u0301 mill"]
    assert found.ends[-1] == len("e\u0301 mill")


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda: byte_level(prefix=True),
        lambda: byte_level(normalizers.Lowercase()),
        lambda: byte_level(processor=post.RobertaProcessing(("<|im_end|>", 1), ("<|im_end|>", 1))),
        lambda: with_strip(byte_level()),
        lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    ],
)
def test_other_tokenizers_are_asked_themselves(tokenizer, tmp_path):
    assert token_places(spec_of(tokenizer(), tmp_path), True) is None


def with_strip(tokenizer):
    """The same with a token that takes the spaces before it."""
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    assert json.loads(tokenizer.to_str())["added_tokens"][-1]["lstrip"]
    return tokenizer
