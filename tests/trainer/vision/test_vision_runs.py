"""Runs on pictures, as a user starts them: layouts, resuming, adapters, models."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from pictures import encoded, images_record, noise, write_picture_shards
from runs import Training, checkpoint_tensors, exact_metrics, read_metrics
from safetensors.torch import load_file
from tiny_vision import (
    PLACEHOLDER,
    VOCABULARY,
    documents_of,
    extra_arguments,
    make_rows,
    save_tiny,
    their_arguments,
)
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from headrace.dataprep.prepare import prepare
from headrace.jobs import cli
from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.shards.manifest import TokenizerRecord
from headrace.schemas.shards.manifest_file import write_manifest
from headrace.schemas.vision.processor import read_processor
from headrace.trainer.export.merge import merge


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("qwen2_vl", tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def shards(model, tmp_path_factory):
    """Sixteen rows of documents with 0 to 4 pictures."""
    counts = [[2, 0], [1, 4, 0], [3], [0, 0], [1], [2, 1], [0], [1, 1, 1]] * 2
    rows = [
        {
            "input_ids": row.input_ids.tolist(),
            "loss_mask": row.loss_mask.tolist(),
            "document_lengths": row.document_lengths.tolist(),
            "images": [entry._asdict() for entry in row.images] or None,
        }
        for row in make_rows("qwen2_vl", counts)
    ]
    folder = tmp_path_factory.mktemp("shards")
    own = read_processor(model)
    record = images_record(own.family, own.settings, PLACEHOLDER)
    manifest = write_picture_shards(folder, rows, record, evaluation=rows[:3])
    tokenizer = TokenizerRecord(
        fingerprint=file_sha256(model / "tokenizer.json"),
        vocabulary_size=VOCABULARY,
        special_tokens={},
    )
    write_manifest(folder, manifest.model_copy(update={"tokenizer": tokenizer}))
    return folder


@pytest.fixture
def training(model, shards, tmp_path):
    config = tmp_path / "train.toml"
    config.write_text(
        f"""
        model = "{model}"
        output_dir = "unused"
        max_steps = 4
        gradient_accumulation_steps = 4
        threads = 1
        [vision]
        projector = true
        [[datasets]]
        path = "{shards}"
        [[evaluation_datasets]]
        path = "{shards}"
        [adapter]
        rank = 4
        vision = true
        [optimizer]
        lr = 2e-3
        """
    )
    return Training(tmp_path, config)


def test_a_tower_on_a_stage_of_its_own_trains_bitwise_alike(training):
    one = training.run("one")
    apart = training.run("apart", 2, pipeline_stages=2, vision_stages=1)
    assert exact_metrics(apart) == exact_metrics(one)


def logits_of(network, model, rows):
    ids, _, tiles = next(entry for entry in documents_of(rows) if entry[2])
    ids = torch.tensor(ids[None]).long()
    arguments = their_arguments(model, "qwen2_vl", tiles)
    arguments |= extra_arguments("qwen2_vl", (ids == PLACEHOLDER).int())
    with torch.no_grad():
        return network.eval()(input_ids=ids, **arguments).logits


def test_adapters_on_tower_and_projector_are_read_by_peft_and_merged(training, model, tmp_path):
    run = training.run("one")
    rows = make_rows("qwen2_vl")
    before = AutoModelForImageTextToText.from_pretrained(model)
    plain = logits_of(before, model, rows)
    adapted = logits_of(PeftModel.from_pretrained(before, run / "adapter"), model, rows)
    assert (adapted - plain).abs().max() > 1e-3
    names = set(load_file(run / "adapter" / "adapter_model.safetensors"))
    assert any("visual.blocks.1.attn.qkv.lora_A" in name for name in names)
    assert any("visual.merger.mlp.2.weight" in name for name in names)
    sampled = answer_of(model, rows, run / "adapter")
    merge(model, run / "adapter", tmp_path / "merged")
    assert answer_of(tmp_path / "merged", rows) == sampled
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, tmp_path / "merged", rows), adapted)


def answer_of(model, rows, adapter=None):
    """What `headrace sample --image` prints for a document's pictures."""
    tiles = next(tiles for _, _, tiles in documents_of(rows) if tiles)
    files = []
    for number, tile in enumerate(tiles):
        files.append(model.parent / f"{model.name}-{number}.png")
        files[-1].write_bytes(tile.bytes)
    images = [part for file in files for part in ("--image", str(file))]
    prompt = "w10 " + " w11 ".join(["<|vision_start|> <image> <|vision_end|>"] * len(files))
    options = [] if adapter is None else ["--adapter", str(adapter)]
    command = ["sample", str(model), prompt, *images, *options, "--max-new-tokens", "4"]
    done = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output.strip().splitlines()[-1]


TEMPLATE = """{% for m in messages %}{% if m.role == "user" %}w3 {% if m.content is string %}
{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == "image" %}
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %} {% endfor %}
{% endif %}{% else %}w4 {% if m.content is string %}{{ m.content }}{% else %}
{{ m.content[0].text }}{% endif %} w2 {% endif %}{% endfor %}
{% if add_generation_prompt %}w4 {% endif %}"""


def test_what_prepare_makes_of_chats_with_pictures_is_trained(training, model, shards, tmp_path):
    chatty = shutil.copytree(model, tmp_path / "chatty")
    table = json.loads((chatty / "tokenizer_config.json").read_text())
    (chatty / "tokenizer_config.json").write_text(json.dumps(table | {"chat_template": TEMPLATE}))
    rows = []
    for number in range(12):
        name = f"{number}.png"
        (tmp_path / name).write_bytes(encoded(noise((20 + number, 30), number)))
        asked = {"user": ["w11 <image> w12", name]}
        rows.append(json.dumps([asked, {"assistant": f"w{20 + number}"}]))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    settings = {
        "output": str(tmp_path / "prepared"),
        "tokenizer": str(chatty),
        "sequence_len": 64,
        "shards": 1,
        "evaluation_fraction": 0.3,
        "images": {"model": str(chatty), "folder": str(tmp_path)},
        "sources": [{"name": "seen", "type": "chat", "path": str(tmp_path / "rows.jsonl")}],
    }
    prepare(PrepareConfig.model_validate(settings), workers=1)
    text = training.config.read_text()
    training.config.write_text(text.replace(str(shards), str(tmp_path / "prepared")))
    run = training.run("run", model=str(chatty))
    trained = [line["trained_tokens"] for line in read_metrics(run) if line["kind"] == "train"]
    assert all(trained)


@pytest.mark.exhaustive
def test_full_fine_tuning_leaves_a_frozen_tower_as_it_was(training, model):
    run = training.run("full", adapter__kind="none", adapter__vision=False)
    whole = dict(AutoModelForImageTextToText.from_pretrained(run / "model").named_parameters())
    assert (run / "model" / "preprocessor_config.json").is_file()
    for name, value in AutoModelForImageTextToText.from_pretrained(model).named_parameters():
        frozen = "visual" in name and "merger" not in name
        assert torch.equal(whole[name], value) == frozen, name


@pytest.mark.exhaustive
def test_pictures_train_alike_in_replicas_with_recomputation_and_after_a_stop(training):
    one = training.run("one")
    losses = exact_metrics(one)
    again = training.run("again", 1, activation_checkpointing="full")
    assert [line["loss"] for line in exact_metrics(again)] == [line["loss"] for line in losses]
    replicas = training.run("replicas", 2, gradient_accumulation_steps=2)
    for line, other in zip(losses, exact_metrics(replicas), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert other["rows_sha256"] == line["rows_sha256"]
    stopped = training.run("stopped", max_steps=2)
    assert exact_metrics(training.run("stopped", 1, "--resume", "--data-changed", "continue"))
    assert checkpoint_tensors(stopped).keys() == checkpoint_tensors(one).keys()
    for name, value in checkpoint_tensors(one).items():
        assert torch.equal(value, checkpoint_tensors(stopped)[name]), name
