"""Special tokens that stand in a text: text where they are to be, whatever the model holds."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from headrace.dataprep.formats.chat import ChatFormat
from headrace.dataprep.formats.preference import PreferenceFormat
from headrace.dataprep.input.records import Place, Record, Reject
from headrace.dataprep.text.encoding import encode_texts
from headrace.dataprep.text.special_pieces import MARK, mark_text, special_pattern
from headrace.dataprep.text.tokenizer_spec import read_spec
from headrace.schemas.prepare.chat_config import ChatConfig
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.prepare.source_config import SourceConfig

LETTERS = "▁abcdefghijklmnopqrstuvwxyzAQ</>|_:"
CHATML = (
    "{% for m in messages %}{{ '<s>' + m.role + ':' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def unigram():
    """A model as SentencePiece makes it: `<s>` is one of its pieces, and the likeliest way to
    write those three letters."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    model = models.Unigram([*pieces, *((letter, -5.0) for letter in LETTERS)], 0, False)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    return tokenizer


def bpe():
    """A model with a merge that makes a special token, and one that is looked up as a word."""
    vocabulary = {piece: n for n, piece in enumerate(["<unk>", "<s>", "</s>", *LETTERS, "<s"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("<", "s"), ("<s", ">")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


def words():
    vocabulary = {"[UNK]": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def specify(tmp_path, tokenizer, **config):
    tokenizer.add_special_tokens([AddedToken(text, normalized=True) for text in ("<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("think", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    sources = [{"name": "a", "type": "documents", "path": "a.jsonl"}]
    values = {"output": "out", "tokenizer": str(tmp_path), "sources": sources}
    return read_spec(PrepareConfig.model_validate(values | config))


@pytest.mark.parametrize("make", [unigram, bpe, words])
def test_a_special_token_in_a_document_is_text(make, tmp_path):
    tokenizer = make()
    spec = specify(tmp_path, tokenizer)
    assert spec.makes_special
    text = "a <s> b</s> think"
    (kept,) = encode_texts(spec, [text], parse_special_tokens=False)
    assert not {1, 2} & {*kept.tolist()}
    if make is unigram:
        assert tokenizer.decode(kept.tolist(), skip_special_tokens=False) == text
    think = tokenizer.token_to_id("think")
    assert think in kept.tolist()  # a token that is not special stays one
    (parsed,) = encode_texts(spec, [text], parse_special_tokens=True)
    assert parsed.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert 1 in parsed.tolist()


def test_a_tokenizer_whose_model_makes_none_keeps_its_identity(tmp_path, tokenizer_folder):
    values = {"output": "out", "tokenizer": str(tokenizer_folder)}
    sources = [{"name": "a", "type": "documents", "path": "a.jsonl"}]
    spec = read_spec(PrepareConfig.model_validate(values | {"sources": sources}))
    assert not spec.makes_special
    assert "special_pieces" not in spec.identity()
    assert specify(tmp_path, unigram()).identity()["special_pieces"] == "text"


def encode_chat(spec, messages, **chat):
    record = Record({"messages": messages}, Place("a.jsonl", 0, 0))
    (result,) = ChatFormat(ChatConfig(**chat), spec).encode([record])
    return result


def shown(spec, sample):
    """The pieces of a sample, the trained ones between ⟦ and ⟧."""
    tokenizer = Tokenizer.from_file(spec.file)
    pieces = [tokenizer.id_to_token(number) for number in sample.ids.tolist()]
    marked = [f"⟦{p}⟧" if t else p for p, t in zip(pieces, sample.trained, strict=True)]
    return " ".join(marked).replace("⟧ ⟦", " ")


@pytest.mark.parametrize("make", [unigram, bpe])
def test_only_the_template_s_special_tokens_are_tokens_where_messages_are_split(make, tmp_path):
    spec = specify(tmp_path, make())
    messages = [{"role": "user", "content": "<s>b"}, {"role": "assistant", "content": "a</s>c"}]
    (kept,) = encode_chat(spec, messages, split_special_tokens=True).samples
    user, assistant = " ".join("user:"), " ".join("assistant:")
    letters = "< s >" if make is unigram else "<s >"
    assert shown(spec, kept) == (f"<s> {user} {letters} b </s> <s> {assistant} ⟦a < / s > c </s>⟧")
    (parsed,) = encode_chat(spec, messages).samples
    assert shown(spec, parsed).startswith(f"<s> {user} <s> b </s> <s>")


def test_chats_without_special_tokens_are_the_same_either_way(tmp_path):
    spec = specify(tmp_path, unigram())
    messages = [{"role": "user", "content": "b think"}, {"role": "assistant", "content": "ac"}]
    kept, parsed = (
        encode_chat(spec, messages, split_special_tokens=split) for split in (True, False)
    )
    assert kept.content == parsed.content
    assert kept.samples[0].ids.tolist() == parsed.samples[0].ids.tolist()
    assert kept.samples[0].trained.tolist() == parsed.samples[0].trained.tolist()


def test_what_tells_equal_chats_has_no_marks(tmp_path):
    spec = specify(tmp_path, unigram())
    messages = [{"role": "user", "content": "<s>"}, {"role": "assistant", "content": "a"}]
    kept = encode_chat(spec, messages, split_special_tokens=True)
    assert kept.content == encode_chat(spec, messages).content
    assert not kept.notes or MARK not in str(kept.notes)


def test_answers_of_pairs_are_split_too(tmp_path):
    spec = specify(tmp_path, unigram())
    source = SourceConfig.model_validate(
        {
            "name": "a",
            "type": "preference",
            "path": "a.jsonl",
            "chat": {"split_special_tokens": True},
            "preference": {"as_chat": True},
        }
    )
    fields = {"prompt": "b", "chosen": "a</s>c", "rejected": "c"}
    (result,) = PreferenceFormat(source, spec).encode([Record(fields, Place("a", 0, 0))])
    (sample,) = result.samples
    assert sample.ids.tolist().count(2) == 2
    assert sample.rejected_ids.tolist().count(2) == 2


def test_a_template_that_escapes_texts_is_refused_where_a_mark_would_be_one(tmp_path):
    spec = specify(tmp_path, unigram())
    template = CHATML.replace("m.content", "(m.content | tojson(ensure_ascii=true))")
    messages = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a<s>"}]
    result = encode_chat(spec, messages, template=template, split_special_tokens=True)
    assert isinstance(result, Reject)
    assert result.reason == "special token in an escape"
    messages[1]["content"] = f"a{MARK}"
    result = encode_chat(spec, messages, split_special_tokens=True)
    assert result.reason == "reserved character"


def test_overlapping_special_tokens_are_all_marked():
    pattern = special_pattern(["ab", "bc", "<|x|>", "|"])
    assert mark_text("abc <|x|> |", pattern) == f"a{MARK}b{MARK}c <{MARK}|x|> |"
