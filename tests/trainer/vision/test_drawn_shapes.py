"""A small random vision model learns drawn shapes, and pictures decide what it answers."""

import random

import numpy as np
import pytest
import torch
from pictures import COLORS, SHAPES, images_record, tile, write_picture_shards
from PIL import Image, ImageDraw
from runs import Training
from tiny_vision import (
    END,
    FAMILIES,
    MROPE,
    PLACEHOLDER,
    START,
    TEXT,
    extra_arguments,
    save_tiny,
    their_arguments,
)
from transformers import AutoModelForImageTextToText

from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.shards.manifest import TokenizerRecord
from headrace.schemas.shards.manifest_file import write_manifest
from headrace.schemas.vision.processor import read_processor
from headrace.trainer.vision.tile import Tile

SIZE = (32, 16)
WORDS = {name: 20 + number for number, name in enumerate(["a", "left", "of", *COLORS, *SHAPES])}
BATCH = 16  # documents of a row


def drawn(chance):
    """A picture of two shapes at random places and sizes, and what to say of it."""
    picture = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(picture)
    said = []
    for side in (0, 16):
        color, shape = chance.choice(list(COLORS)), chance.choice(SHAPES)
        size = chance.randint(10, 13)
        x, y = side + chance.randint(1, 15 - size), chance.randint(1, 15 - size)
        box = (x, y, x + size, y + size)
        (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=COLORS[color])
        said.append(["a", color, shape])
    words = [*said[0], "left", "of", *said[1]]
    return picture, [WORDS[word] for word in words]


def document(picture, words, number=0):
    """Ids, what of them is trained, and the tile."""
    tokens = SIZE[0] * SIZE[1] // 64
    ids = [1, START, *[PLACEHOLDER] * tokens, END, *words]
    mask = [False] * (len(ids) - len(words)) + [True] * len(words)
    return ids, mask, tile(number, tokens, picture)


def rows_of(count, seed):
    """Rows of 16 documents."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        parts = [document(*drawn(chance), number) for number in range(BATCH)]
        rows.append(
            {
                "input_ids": [token for ids, _, _ in parts for token in ids],
                "loss_mask": [flag for _, mask, _ in parts for flag in mask],
                "document_lengths": [len(ids) for ids, _, _ in parts],
                "images": [entry for _, _, entry in parts],
            }
        )
    return rows


def answers(network, model, pictures):
    """What the model says of each picture, token by token the likeliest."""
    said = []
    for picture in pictures:
        ids, _, entry = document(picture, [])
        arguments = their_arguments(model, "qwen2_vl", [Tile(**entry)])
        for _ in range(8):
            tokens = torch.tensor([ids])
            kinds = extra_arguments("qwen2_vl", (tokens == PLACEHOLDER).int())
            with torch.no_grad():
                logits = network(input_ids=tokens, **arguments, **kinds).logits
            ids = [*ids, int(logits[0, -1].argmax())]
        said.append(ids[-8:])
    return said


def agreement(said, truths):
    """The share of pictures that all words are right of."""
    return np.mean([one == other for one, other in zip(said, truths, strict=True)])


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_it_answers_held_out_pictures_and_goes_by_them(tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    text = {**TEXT, "rope_parameters": MROPE, "intermediate_size": 128, **sizes}
    vision = {**FAMILIES["qwen2_vl"][0]["vision_config"], "hidden_size": 64}
    parts = {"text_config": text, "vision_config": vision}
    model = save_tiny("qwen2_vl", tmp_path / "model", scale=0.06, **parts)
    own = read_processor(model)
    record = images_record(own.family, own.settings, PLACEHOLDER)
    rows = rows_of(600, 0)
    manifest = write_picture_shards(
        tmp_path / "shards", rows, record, sequence_len=320, rows_in_group=16
    )
    tokenizer = TokenizerRecord(
        fingerprint=file_sha256(model / "tokenizer.json"), vocabulary_size=97, special_tokens={}
    )
    write_manifest(tmp_path / "shards", manifest.model_copy(update={"tokenizer": tokenizer}))
    config = tmp_path / "train.toml"
    config.write_text(
        f"""
        model = "{model}"
        output_dir = "unused"
        gradient_accumulation_steps = 2
        pipeline_stages = 2
        vision_stages = 1
        threads = 1
        [vision]
        train = true
        projector = true
        [[datasets]]
        path = "{tmp_path / "shards"}"
        [adapter]
        kind = "none"
        [optimizer]
        lr = 1e-3
        [scheduler]
        type = "constant"
        warmup_steps = 20
        """
    )
    training = Training(tmp_path, config)
    for steps in (250, 500):  # each in the time of a command; the second goes on
        onwards = ["--resume", "--data-changed", "continue"] if steps > 250 else []
        run = training.run("run", 2, *onwards, max_steps=steps)
    network = AutoModelForImageTextToText.from_pretrained(run / "model").eval()
    chance = random.Random(1)
    held_out = [drawn(chance) for _ in range(60)]
    pictures, truths = [p for p, _ in held_out], [words for _, words in held_out]
    assert agreement(answers(network, model, pictures), truths) >= 0.95
    swapped = answers(network, model, pictures[1:] + pictures[:1])
    assert agreement(swapped, truths) <= 0.2
