"""Single answers with labels: every usual shape, the answer alone trained, the label kept."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer

from headrace.dataprep.shards.verify import verify
from headrace.schemas.prepare.prepare_config import PrepareConfig

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
)
USER = {"role": "user", "content": "Which wheel?"}
ANSWER = {"role": "assistant", "content": "The water wheel."}
SHAPES = {
    "messages": {"prompt": [USER], "completion": [ANSWER], "label": True},
    "a whole conversation": {"completion": [USER, ANSWER], "label": True},
    "messages and a text": {"prompt": [USER], "completion": ANSWER["content"], "label": 1},
    "JSON in strings": {
        "prompt": json.dumps([USER]),
        "completion": json.dumps([ANSWER]),
        "label": "True",
    },
    "other names": {"question": [USER], "reply": ANSWER, "good": "1"},
}


def make_config(tokenizer_folder, rows, changes=None, **source):
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "answers", "type": "unpaired", "path": "answers.jsonl", **source}
    values = {
        "output": "out",
        "tokenizer": str(tokenizer_folder),
        "sequence_len": 256,
        "shards": 1,
        "evaluation_fraction": 0.0,
        "sources": [source],
    }
    return PrepareConfig.model_validate(values | (changes or {}))


def text_of(tokenizer_folder, row):
    """What comes before the trained tokens of a row, and those."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    mask = row["loss_mask"]
    parts = [
        [token for token, mark in zip(row["input_ids"], mask, strict=True) if mark == trained]
        for trained in (False, True)
    ]
    return tuple(tokenizer.decode(part, skip_special_tokens=False) for part in parts)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_answer_alone_is_trained_in_every_shape(shape, corpus, run, rows_of, tokenizer_folder):
    names = {"prompt": "question", "completion": "reply", "label": "good"}
    fields = {"unpaired": names} if shape == "other names" else {}
    config = make_config(tokenizer_folder, [SHAPES[shape]], chat={"template": TEMPLATE}, **fields)
    manifest = run(config)
    (row,) = rows_of("out")
    assert text_of(tokenizer_folder, row) == (
        "<user>Which wheel?<assistant>",
        "The water wheel.</s>",
    )
    assert row["desirable"] is True
    assert manifest.kind == "unpaired"
    assert verify(Path("out")) == []


def test_texts_stand_between_the_ends_of_their_source_and_labels_stay(
    corpus, run, rows_of, bos_tokenizer_folder
):
    rows = [
        {"prompt": "a mill", "completion": f" wheel {n}", "label": n % 3 == 0} for n in range(9)
    ]
    run(make_config(bos_tokenizer_folder, rows, {"deduplicate": {"exact": True}}))
    found = {text_of(bos_tokenizer_folder, row): row["desirable"] for row in rows_of("out")}
    expected = {("<s>a mill", f" wheel {n}</s>"): n % 3 == 0 for n in range(9)}
    assert found == expected


def test_what_is_too_long_is_cut_and_keeps_its_label(corpus, run, rows_of, tokenizer_folder):
    rows = [{"prompt": "mill ", "completion": "wheel " * 90, "label": False}]
    run(make_config(tokenizer_folder, rows, {"sequence_len": 16}))
    (row,) = rows_of("out")
    assert (len(row["input_ids"]), row["desirable"]) == (16, False)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, "missing field"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "no label"),
        ({"prompt": "a", "completion": "b", "label": 0.5}, "no label"),
        ({"prompt": "a", "label": True}, "missing field"),
    ],
)
def test_rows_without_answer_or_label_are_refused(row, reason, corpus, run, tokenizer_folder):
    good = {"prompt": "a", "completion": "b", "label": "false"}
    config = make_config(tokenizer_folder, [good, row], {"max_reject_fraction": 1.0})
    (source,) = run(config).sources
    assert (source.rows, source.rejected_documents) == (1, 1)
    (rejects,) = Path("out/rejects").glob("*")
    assert reason in rejects.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": "best_fit"}, "an answer is a row of its own"),
        ({"sequence_prefix": "<s>"}, "unpaired rows are not packed"),
        ({"overlong": "split"}, "unpaired rows cannot be split"),
    ],
)
def test_packing_is_refused(changes, message, corpus, tokenizer_folder):
    with pytest.raises(ValidationError, match=message):
        make_config(tokenizer_folder, [], changes)
