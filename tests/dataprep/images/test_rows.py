"""Rows with pictures in the shapes that are about, each to the same document."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError
from tokenizers import Tokenizer
from vision_models import VISION_MODELS

from headrace.dataprep.images.families import family_rule
from headrace.dataprep.shards.verify import verify
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.vision.processor import read_processor

ANSWER = "a red circle"
TEXTS = ("Look at ", " and at ", ".")


def rows_of(directory):
    paths = sorted(Path(directory).glob("shard-*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def data_uri(name):
    return (
        "data:image/png;base64," + base64.b64encode(Path(f"pictures/{name}").read_bytes()).decode()
    )


def parts(*pictures):
    first, second = pictures
    texts = [{"type": "text", "text": text} for text in TEXTS]
    return [texts[0], first, texts[1], second, texts[2]]


def asked(content, **row):
    answer = {"role": "assistant", "content": ANSWER}
    return {"messages": [{"role": "user", "content": content}, answer], **row}


def held(name):
    return {"bytes": Path(f"pictures/{name}").read_bytes(), "path": name}


MARKED = "<image>".join(TEXTS)
SHAPES = {
    "jllm": lambda: [{"user": [MARKED, "0.png", "7.png"]}, {"assistant": ANSWER}],
    "parts with paths": lambda: asked(
        parts({"type": "image", "path": "0.png"}, {"type": "image", "image": "7.png"})
    ),
    "OpenAI's parts with data URIs": lambda: asked(
        parts(
            {"type": "image_url", "image_url": {"url": data_uri("0.png")}},
            {"type": "image_url", "image_url": data_uri("7.png")},
        )
    ),
    "base64": lambda: asked(
        parts(
            {"type": "image", "base64": data_uri("0.png").partition(",")[2]},
            {"type": "image", "path": "7.png"},
        )
    ),
    "LLaVA": lambda: {
        "image": ["0.png", "7.png"],
        "conversations": [{"from": "human", "value": MARKED}, {"from": "gpt", "value": ANSWER}],
    },
    "listed, with places in parts": lambda: asked(
        parts({"type": "image"}, {"type": "image"}), images=["0.png", "7.png"]
    ),
    "listed, with markers": lambda: asked(MARKED, images=["0.png", "7.png"]),
    "prompt and completion": lambda: {
        "prompt": MARKED,
        "completion": ANSWER,
        "images": ["0.png", "7.png"],
    },
}


def expected(family):
    """The ids and the tiles of the document."""
    processor = read_processor(Path(family))
    rule = family_rule(processor)
    prepared = [rule.prepare(Image.open(f"pictures/{n}.png").convert("RGB")) for n in (0, 7)]
    text = f"<|im_start|>user\n{TEXTS[0]}{prepared[0].text}{TEXTS[1]}{prepared[1].text}{TEXTS[2]}"
    text += f"<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
    tokenizer = Tokenizer.from_file(f"{family}/tokenizer.json")
    return tokenizer.encode(text, add_special_tokens=False).ids, prepared


def assert_document(row, family, sizes=((60, 90), (123, 69))):
    ids, prepared = expected(family)
    assert row["input_ids"] == ids
    trained = np.flatnonzero(row["loss_mask"])
    tokenizer = Tokenizer.from_file(f"{family}/tokenizer.json")
    shown = tokenizer.decode([ids[place] for place in trained], skip_special_tokens=False)
    assert shown == f"{ANSWER}<|im_end|>"
    tiles = [(n, image, p.tokens) for n, p in enumerate(prepared) for image in p.tiles]
    assert len(row["images"]) == len(tiles)
    for entry, (number, image, tokens) in zip(row["images"], tiles, strict=True):
        assert (entry["picture"], entry["tokens"]) == (number, tokens)
        assert (entry["width"], entry["height"]) == sizes[number]
        found = Image.open(io.BytesIO(entry["bytes"]))
        assert np.array_equal(np.asarray(found), np.asarray(image))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_row_gives_the_same_document(shape, config, run, write_rows):
    write_rows([SHAPES[shape]()])
    manifest = run(config(shards=1))
    assert_document(*rows_of("out"), "qwen2_vl")
    assert manifest.images.ledger.pictures_out["train"] == 2
    assert verify(Path("out")) == []


@pytest.mark.parametrize("family", VISION_MODELS)
def test_every_family_gives_its_own_tokens_and_tiles(family, config, run, write_rows):
    write_rows([SHAPES["jllm"]()])
    run(config(shards=1, family=family, sequence_len=1 << 14))
    assert_document(*rows_of("out"), family)
    assert verify(Path("out")) == []


def test_pictures_in_columns_of_datasets_are_read(config, run, write_rows):
    write_rows([])
    row = asked(parts({"type": "image"}, {"type": "image"}))
    messages = json.dumps(row["messages"])
    table = pa.Table.from_pylist([{"messages": messages, "images": [held("0.png"), held("7.png")]}])
    pq.write_table(table, "rows.parquet")
    source = {"name": "drawn", "type": "chat", "path": "rows.parquet"}
    run(config(shards=1, images={"folder": None}, sources=[source]))
    assert_document(*rows_of("out"), "qwen2_vl")


def test_pictures_at_addresses_are_read_where_the_config_allows_them(config, run, write_rows):
    folder = Path("pictures").resolve().as_uri()
    rows = [
        [{"user": [MARKED, f"{folder}/0.png", f"{folder}/7.png"]}, {"assistant": ANSWER}],
        [{"user": ["<image>", f"{folder}-secret/0.png"]}, {"assistant": ANSWER}],
        [{"user": ["<image>", f"{folder}/none.png"]}, {"assistant": ANSWER}],
    ]
    write_rows(rows)
    run(config(shards=1, images={"folder": None, "addresses": [folder]}))
    assert_document(*rows_of("out"), "qwen2_vl")
    rejects = map(json.loads, Path("out/rejects/rejects.jsonl").read_text().splitlines())
    assert [r["reason"] for r in rejects] == ["address not allowed", "unreachable picture"]


def test_paths_may_be_relative_to_a_folder_elsewhere(config, run, write_rows):
    write_rows([SHAPES["jllm"](), [{"user": ["<image>", "../rows.jsonl"]}, {"assistant": "x"}]])
    run(config(shards=1, images={"folder": Path("pictures").resolve().as_uri()}))
    assert_document(*rows_of("out"), "qwen2_vl")
    (reject,) = map(json.loads, Path("out/rejects/rejects.jsonl").read_text().splitlines())
    assert reject["reason"] == "path escapes the folder"


@pytest.mark.parametrize("encoding", ["webp", "jpeg"])
def test_other_encodings_hold_the_same_pictures(encoding, config, run, write_rows):
    write_rows([SHAPES["jllm"]()])
    run(config(shards=1, images={"encoding": encoding}))
    (row,) = rows_of("out")
    _, prepared = expected("qwen2_vl")
    for entry, picture in zip(row["images"], prepared, strict=True):
        found = Image.open(io.BytesIO(entry["bytes"]))
        assert found.format == encoding.upper()
        wanted = np.asarray(picture.tiles[0]).astype(int)
        worst = np.abs(np.asarray(found.convert("RGB")) - wanted).max()
        assert worst <= (0 if encoding == "webp" else 60)
    assert verify(Path("out")) == []


def test_pictures_of_a_row_without_places_stand_before_its_first_question(config, run, write_rows):
    write_rows([asked("Which?", images=["0.png"]), asked("<image>Which?", images=["0.png"])])
    run(config(shards=1))
    first, second = pieces(rows_of("out"))
    assert first == second


def pieces(rows):
    found = []
    for row in rows:
        start = 0
        for length in row["document_lengths"]:
            found.append(row["input_ids"][start : start + length])
            start += length
    return found


@pytest.mark.parametrize(
    "answers",
    [
        {"prompt": MARKED, "chosen": ANSWER, "rejected": "a cat"},
        {
            "prompt": [{"role": "user", "content": MARKED}],
            "chosen": [{"role": "assistant", "content": ANSWER}],
            "rejected": [{"role": "assistant", "content": "a cat"}],
        },
        {
            "chosen": asked(MARKED)["messages"],
            "rejected": [asked(MARKED)["messages"][0], {"role": "assistant", "content": "a cat"}],
        },
    ],
    ids=["texts", "messages", "whole conversations"],
)
def test_both_sides_of_a_pair_share_its_pictures(answers, config, run, write_rows):
    write_rows([answers | {"images": ["0.png", "7.png"]}])
    source = {"name": "drawn", "type": "preference", "path": "rows.jsonl"}
    run(config(shards=1, sources=[source]))
    (row,) = rows_of("out")
    assert_document(row, "qwen2_vl")
    placeholder = Tokenizer.from_file("qwen2_vl/tokenizer.json").token_to_id("<|image_pad|>")
    assert row["rejected_input_ids"].count(placeholder) == row["input_ids"].count(placeholder)
    assert verify(Path("out")) == []


@pytest.mark.parametrize("prompt", [MARKED, [{"role": "user", "content": MARKED}]])
def test_single_answers_with_labels_have_pictures_in_their_prompts(prompt, config, run, write_rows):
    answers = [{"completion": ANSWER, "label": True}, {"completion": "a cat", "label": False}]
    pictures = {"prompt": prompt, "images": ["0.png", "7.png"]}
    if isinstance(prompt, list):
        answers[0]["completion"] = [{"role": "assistant", "content": ANSWER}]
    write_rows([pictures | answer for answer in [*answers, answers[0]]])
    source = {"name": "drawn", "type": "unpaired", "path": "rows.jsonl"}
    manifest = run(config(shards=1, sources=[source], deduplicate={"exact": True}))
    rows = rows_of("out")
    assert sorted(row["desirable"] for row in rows) == [False, True]
    assert_document(next(row for row in rows if row["desirable"]), "qwen2_vl")
    assert manifest.images.ledger.pictures_dropped == {"exact duplicate": 2}
    assert verify(Path("out")) == []


def test_texts_without_pictures_go_beside_those_with(config, run, write_rows):
    write_rows([asked("Hello"), SHAPES["jllm"]()])
    Path("plain.txt").write_text("the wheel turns")
    sources = [
        {"name": "drawn", "type": "chat", "path": "rows.jsonl"},
        {"name": "plain", "type": "text", "path": "plain.txt"},
    ]
    run(config(shards=1, packing="none", sources=sources))
    assert sorted(len(row["images"] or []) for row in rows_of("out")) == [0, 0, 2]
    assert verify(Path("out")) == []


def test_templates_that_take_lists_or_texts_alone_are_found_out(config, run, write_rows, model):
    lists = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
        "{% if p['type'] == 'image' %}<|image_pad|>{% else %}{{ p['text'] }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
    )
    texts = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.replace('x', 'x') }}"
        "<|im_end|>\n{% endfor %}"
    )
    write_rows([SHAPES["jllm"]()])
    for number, template in enumerate([lists, texts]):
        chat = {"template": template}
        source = {"name": "drawn", "type": "chat", "path": "rows.jsonl", "chat": chat}
        run(config(output=f"out{number}", shards=1, sources=[source]))
        assert_document(*rows_of(f"out{number}"), "qwen2_vl")


REFUSED = {
    "a marker without a picture": (
        asked("<image> <image>", images=["0.png"]),
        "place without a picture",
    ),
    "a picture without a place": (
        asked("<image>", images=["0.png", "1.png"]),
        "picture without a place",
    ),
    "the token of pictures in a text": (asked("a <|image_pad|> b"), "placeholder in a text"),
    "a part that names nothing": (
        asked([{"type": "image_url", "image_url": {"detail": "low"}}]),
        "no picture",
    ),
    "too many": (asked("<image>" * 5, images=["0.png"] * 5), "too many pictures"),
    "a video": (asked([{"type": "video", "video": "a.mp4"}]), "content is not text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_whose_places_and_pictures_differ_are_refused_alone(case, config, run, write_rows):
    row, reason = REFUSED[case]
    write_rows([SHAPES["jllm"](), row, SHAPES["LLaVA"]()])
    manifest = run(config(shards=1, images={"max_count": 4}))
    (reject,) = map(json.loads, Path("out/rejects/rejects.jsonl").read_text().splitlines())
    assert (reject["line"], reject["reason"]) == (2, reason)
    assert manifest.images.ledger.pictures_out["train"] == 4
    assert manifest.images.ledger.difference() == 0


def test_a_text_that_a_source_parses_may_not_hold_the_token_of_pictures(config, run, write_rows):
    write_rows([SHAPES["jllm"]()])
    Path("plain.txt").write_text("it fills <|image_pad|> too")
    sources = [
        {"name": "drawn", "type": "chat", "path": "rows.jsonl"},
        {"name": "plain", "type": "text", "path": "plain.txt", "parse_special_tokens": True},
    ]
    with pytest.raises(DataError, match=r"placeholder in a text: 1"):
        run(config(shards=1, sources=sources))


def test_a_document_with_pictures_is_dropped_whole_where_it_is_too_long(config, run, write_rows):
    long = asked("<image>" + "very " * 90, images=["0.png"])
    write_rows([SHAPES["jllm"](), long])
    for overlong in ("drop", "truncate", "split"):
        manifest = run(config(output=overlong, shards=1, sequence_len=128, overlong=overlong))
        ledger = manifest.images.ledger
        assert ledger.pictures_dropped == {"overlong document with pictures dropped": 1}
        assert verify(Path(overlong)) == []


def test_a_template_without_a_place_for_pictures_is_refused(config, run, write_rows):
    write_rows([SHAPES["jllm"]()])
    chat = {"template": "{% for m in messages %}{{ m.role }}: {{ m.text }}\n{% endfor %}"}
    source = {"name": "drawn", "type": "chat", "path": "rows.jsonl", "chat": chat}
    with pytest.raises(DataError, match=r"writes no <\|image_pad\|> for a picture"):
        run(config(sources=[source]))


def test_a_tokenizer_without_the_familys_tokens_is_refused(config, run, write_rows, model):
    write_rows([SHAPES["jllm"]()])
    with pytest.raises(DataError, match=r'no token "\[IMG\]", which mistral3 has for pictures'):
        run(config(tokenizer=model("qwen2_vl"), family="mistral3"))


def test_cutting_and_mixing_are_refused_before_work_begins(config):
    with pytest.raises(ValidationError, match="would cut documents from their pictures"):
        config(packing="concatenate")
    with pytest.raises(ValidationError, match="mix_sources is not supported with pictures"):
        config(mix_sources=True, overlong="drop")


def test_another_pillow_than_the_config_names_is_refused(config, run, write_rows):
    write_rows([SHAPES["jllm"]()])
    run(config(shards=1))
    saved = json.loads(Path("out/prepare.json").read_text())["config"]["images"]["identity"]
    assert saved["family"] == "qwen2_vl"
    with pytest.raises(ConfigError, match=r"images\.identity: pillow of the config is not what"):
        run(config(output="other", images={"identity": saved | {"pillow": "1.0"}}))


AXOLOTL = {"name": "drawn", "type": "axolotl", "path": "rows.jsonl"}


@pytest.mark.parametrize(
    "shape", ["parts with paths", "base64", "listed, with places in parts", "listed, with markers"]
)
def test_axolotls_chats_give_the_same_document(shape, config, run, write_rows):
    write_rows([SHAPES[shape]()])
    run(config(shards=1, sources=[AXOLOTL | {"axolotl": {"type": "chat_template"}}]))
    assert_document(*rows_of("out"), "qwen2_vl")
    assert verify(Path("out")) == []


@pytest.mark.parametrize("kind", ["chat", "axolotl"])
def test_pictures_in_trained_turns_are_not_trained(kind, config, run, write_rows):
    row = asked("Draw.")
    row["messages"][1]["content"] = parts(
        {"type": "image", "path": "0.png"}, {"type": "image", "path": "7.png"}
    )
    write_rows([row])
    source = AXOLOTL | {"axolotl": {"type": "chat_template"}}
    source = source if kind == "axolotl" else {**AXOLOTL, "type": "chat"}
    run(config(shards=1, sources=[source]))
    (found,) = rows_of("out")
    tokenizer = Tokenizer.from_file("qwen2_vl/tokenizer.json")
    trained = [i for i, t in zip(found["input_ids"], found["loss_mask"], strict=True) if t]
    shown = tokenizer.decode(trained, skip_special_tokens=False)
    assert shown == f"{''.join(TEXTS)}<|im_end|>"


def test_bad_pictures_refuse_axolotls_rows_alone(config, run, write_rows):
    bad = asked([{"type": "image", "path": "none.png"}])
    write_rows([SHAPES["parts with paths"](), bad, asked("<|image_pad|>")])
    manifest = run(config(shards=1, sources=[AXOLOTL | {"axolotl": {"type": "chat_template"}}]))
    rejects = map(json.loads, Path("out/rejects/rejects.jsonl").read_text().splitlines())
    assert [r["reason"] for r in rejects] == ["missing picture", "placeholder in a text"]
    assert manifest.images.ledger.difference() == 0


def test_other_types_of_axolotl_are_refused(config, run, write_rows):
    write_rows([asked("x")])
    with pytest.raises(ConfigError, match='type = "alpaca" reads no pictures; set type = "chat_'):
        run(config(sources=[AXOLOTL | {"axolotl": {"type": "alpaca"}}]))


def test_axolotls_own_reader_is_refused(config):
    source = {"type": "axolotl", "axolotl": {"type": "chat_template"}, "engine": "axolotl"}
    with pytest.raises(ValidationError, match='engine = "axolotl" reads no pictures; drop it'):
        config(packing="none", sources=[{"name": "drawn", "path": "rows.jsonl", **source}])


def test_prefixes_and_masks_of_tokens_leave_pictures_where_they_are(config, run, write_rows):
    write_rows([SHAPES["jllm"](), asked("Hello"), SHAPES["LLaVA"]()])
    source = {"name": "drawn", "type": "chat", "path": "rows.jsonl", "mask_tokens": True}
    run(config(shards=1, sequence_prefix="<s>", sources=[source]))
    (row,) = rows_of("out")
    assert row["input_ids"][0] == Tokenizer.from_file("qwen2_vl/tokenizer.json").token_to_id("<s>")
    assert [tile["picture"] for tile in row["images"]] == [0, 1, 2, 3]
    assert verify(Path("out")) == []


def test_pictures_and_labels_go_through_the_search_for_duplicates(config, run, write_rows):
    rows = [{"prompt": MARKED, "chosen": ANSWER, "rejected": f"a cat {n}"} for n in range(3)]
    write_rows([row | {"images": ["0.png", "7.png"]} for row in [*rows, rows[0]]])
    source = {"name": "drawn", "type": "preference", "path": "rows.jsonl"}
    manifest = run(config(shards=1, sources=[source], deduplicate={"exact": True}))
    assert len(rows_of("out")) == 3
    assert manifest.images.ledger.pictures_dropped == {"exact duplicate": 2}
    assert verify(Path("out")) == []
