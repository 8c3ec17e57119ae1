"""Runs on pictures, as a user starts them: layouts, resuming, adapters, models."""

import pytest
from pictures import images_record, write_picture_shards
from runs import Training, exact_metrics
from tiny_vision import PLACEHOLDER, VOCABULARY, make_rows, save_tiny

from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.shards.manifest import TokenizerRecord
from headrace.schemas.shards.manifest_file import write_manifest


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
    record = images_record("qwen2_vl", {}, PLACEHOLDER)
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


def test_pictures_train_alike_in_every_layout(training):
    one = training.run("one")
    two = training.run("two", 2, pipeline_stages=2)
    assert exact_metrics(one) == exact_metrics(two)
