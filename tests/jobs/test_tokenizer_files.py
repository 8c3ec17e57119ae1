"""Other forms of tokenizers to `tokenizer.json`, compared with their own libraries."""

import base64
import json
import re

import pytest
import sentencepiece
import tiktoken
from tokenizers import Tokenizer

from headrace.dataprep.text.tokenizer_spec import read_spec
from headrace.jobs.commands import tokenizer_files
from headrace.jobs.commands.tokenizer_files import PLAIN_TEXTS, convert_tokenizer
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.prepare.prepare_config import PrepareConfig

SENTENCES = ["The water of the river turns the wheel of the mill.", "x = [1, 2, 3]", *PLAIN_TEXTS]
SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PATTERN = r"\p{L}+|\p{N}{1,3}|[^\p{L}\p{N}]"


def write_pieces(folder, kind, tokenizer_class="LlamaTokenizer"):
    """A model as Llama 2's: BPE, bytes for what is unknown, white space as it is."""
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 30),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    settings = SETTINGS | {"tokenizer_class": tokenizer_class}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_ranks(folder, **settings):
    """Single bytes, and a few merges."""
    folder.mkdir()
    words = [b"th", b"the", b"er", b"wat", b"wa", b"water", b" t"]
    tokens = [bytes([number]) for number in range(256)] + sorted(words, key=len)
    lines = (f"{base64.b64encode(token).decode()} {n}\n" for n, token in enumerate(tokens))
    (folder / "qwen.tiktoken").write_text("".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def spec_of(folder):
    sources = [{"name": "a", "type": "text", "path": "a"}]
    values = {"output": "o", "tokenizer": str(folder), "sources": sources}
    return read_spec(PrepareConfig.model_validate(values))


def test_a_model_of_sentencepiece_is_converted_and_can_be_used(tmp_path):
    folder = write_pieces(tmp_path / "llama", "bpe")
    with pytest.raises(DataError, match=r"not found; run headrace convert-tokenizer .*llama"):
        spec_of(folder)
    line = convert_tokenizer(folder)
    assert re.search(r"written; (9|1\d) of 12 hard texts have SentencePiece's ids$", line)
    assert spec_of(folder).vocabulary_size > 256
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in PLAIN_TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False).ids == model.encode(text)
    with pytest.raises(ConfigError, match="is there already"):
        convert_tokenizer(folder)


def test_a_class_that_does_not_fit_the_model_is_refused(tmp_path):
    folder = write_pieces(tmp_path / "other", "unigram", "GPT2Tokenizer")
    with pytest.raises(DataError, match=r"other ids than SentencePiece|cannot convert it"):
        convert_tokenizer(folder)
    assert not (folder / "tokenizer.json").exists()


def test_ranks_of_tiktoken_are_converted_exactly(tmp_path):
    added = {"263": {"content": "<|end|>"}, "264": {"content": "<|user|>"}}
    folder = write_ranks(tmp_path / "qwen", added_tokens_decoder=added, eos_token="<|end|>")
    line = convert_tokenizer(folder, PATTERN)
    assert line.endswith("12 of 12 hard texts have tiktoken's ids")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ranks = tokenizer_files.read_ranks(folder / "qwen.tiktoken")
    encoding = tiktoken.Encoding("a", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert tokenizer.encode("the water").ids == encoding.encode_ordinary("the water")
    assert tokenizer.encode("the<|user|>").ids[-1] == 264
    assert spec_of(folder).eos == 263


def test_special_tokens_with_other_ids_are_refused(tmp_path):
    folder = write_ranks(tmp_path / "qwen", added_tokens_decoder={"300": {"content": "<|end|>"}})
    with pytest.raises(DataError, match=r'"<\|end\|>" has id 300, after the tokens of qwen'):
        convert_tokenizer(folder)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no tokenizer\.model, .* or \*\.tiktoken in it"):
        convert_tokenizer(tmp_path)
    folder = write_ranks(tmp_path / "qwen")
    monkeypatch.setattr(tokenizer_files, "LIBRARIES", ("no_such_library",))
    with pytest.raises(ConfigError, match=r"needs no_such_library; .*pip install '\.\[convert\]'"):
        convert_tokenizer(folder)
