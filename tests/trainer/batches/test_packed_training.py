"""Packed rows train as the plan says, the same on every layout and after every resumption."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from runs import STDLIB, checkpoint_tensors, exact_metrics, make_shards, read_metrics, source

from headrace.jobs.commands.plan_data import plan_data
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.batch import make_batch
from headrace.trainer.objectives.rows import row_losses
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.shards.decoded_rows import Row
from headrace.trainer.shards.packed_rows import PackedRow

PACKING = {"pack": "best_fit", "tokens_per_row": 160, "look_ahead": 16, "overlong": "truncate"}
PLANNED = ("epoch", "tokens", "fill", "source_tokens", "overlong_rows", "overlong_tokens")


@pytest.fixture(scope="module")
def unpacked_shards(tiny_model, tmp_path_factory):
    """A document a row, of up to 200 tokens."""
    output = tmp_path_factory.mktemp("shards") / "unpacked"
    changes = {"sequence_len": 200, "packing": "none", "overlong": "drop"}
    sources = [source("json", STDLIB / "json" / "*.py"), source("small", STDLIB / "bisect.py")]
    return make_shards(tiny_model, output, sources=sources, **changes)


@pytest.mark.slow
def test_packed_rows_train_as_planned_on_every_layout_and_after_a_resumption(
    training, tiny_shards, unpacked_shards
):
    text = training.config.read_text().replace(str(tiny_shards), str(unpacked_shards))
    training.config.write_text(text.replace("max_steps = 10", "epochs = 2"))
    packing = {f"loader__{key}": value for key, value in PACKING.items()}
    settings = {**packing, "gradient_accumulation_steps": 16, "checkpoint__every_steps": 3}
    one = training.run("one", checkpoint__keep_last=99, **settings)
    steps = [line for line in read_metrics(one) if line["kind"] == "train"]
    assert len(steps) > 6
    assert any(line["overlong_rows"] for line in steps)

    sets = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()]
    planned = plan_data(
        load_config(TrainConfig, training.config, sets), 1, Console(file=io.StringIO()), None, None
    )
    for line, plan in zip(steps, planned, strict=True):
        names = ("step", "first_row", "rows_sha256", *PLANNED)
        assert {name: line[name] for name in names} == {n: getattr(plan, n) for n in names}
    rows = sum(shard.rows for shard in read_manifest(unpacked_shards).split("train"))
    assert sum(plan.rows for plan in planned) == 2 * rows

    resumed = shutil.copytree(one, training.directory / "resumed")
    for path in resumed.glob("checkpoints/step-*"):
        if path.name != "step-000003":
            shutil.rmtree(path)
    training.run("resumed", 1, "--resume", reporting__every_steps=2, **settings)
    assert exact_metrics(resumed) == exact_metrics(one)
    ours, expected = checkpoint_tensors(resumed), checkpoint_tensors(one)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)

    other = {"gradient_accumulation_steps": 4, "micro_batch_size": 2}
    both = training.run(
        "both", 2, **settings | other, adapter__dropout=0.0, loader__prefetch_batches=0
    )
    lines = [line for line in read_metrics(both) if line["kind"] == "train"]
    for line, expected in zip(lines, steps, strict=True):
        names = ("rows_sha256", *PLANNED)
        assert {name: line[name] for name in names} == {name: expected[name] for name in names}
    assert lines[0]["loss"] == pytest.approx(steps[0]["loss"], rel=0.01)


ROWS = [
    Row(np.arange(10, 16, dtype=np.int32), None, np.array([4, 2], np.int32), "a", 1),
    Row(np.arange(20, 25, dtype=np.int32), np.array([0, 1, 0, 1, 1], bool), np.array([5]), "b", 2),
    Row(np.arange(30, 33, dtype=np.int32), None, np.array([3], np.int32), "a", 3),
]


def make(*places, length=16):
    return make_batch([places], length, Position(), OverlongCount())


def test_a_place_of_several_rows_holds_what_their_own_places_would():
    packed = make(ROWS, [])
    single = make(*([row] for row in ROWS))
    for name in ("input_ids", "labels"):
        own = [getattr(single, name)[0, i, : len(row.input_ids)] for i, row in enumerate(ROWS)]
        together = getattr(packed, name)[0]
        assert together[0, :14].tolist() == torch.cat(own).tolist()
        assert set(together[0, 14:].tolist()) == set(together[1].tolist())
    assert packed.labels[0, 0].tolist() == [
        *(11, 12, 13, -100, 15, -100, 21, -100, 23, 24, -100, 31, 32, -100, -100, -100)
    ]
    assert packed.document_lengths == [[[4, 2, 5, 3, 2], [16]]]
    assert packed.tokens == single.tokens == 14
    assert packed.trained_tokens == single.trained_tokens == 9
    assert packed.rows == [[[PackedRow("a", 1, 6), PackedRow("b", 2, 5), PackedRow("a", 3, 3)], []]]


@pytest.mark.parametrize(("length", "documents"), [(3, [3]), (4, [4]), (5, [4, 1])])
def test_a_row_longer_than_its_place_is_cut(length, documents):
    batch = make([ROWS[0]], length=length)
    assert batch.input_ids[0, 0].tolist() == list(range(10, 10 + length))
    assert batch.labels[0, 0].tolist() == [*[11, 12, 13, -100][: length - 1], -100]
    assert batch.document_lengths == [[documents]]
    assert batch.rows == [[[PackedRow("a", 1, length)]]]


def test_each_row_of_a_place_gets_its_own_loss():
    batch = make(ROWS[:2], [], ROWS[2:])
    losses = np.where(batch.labels.numpy() >= 0, np.arange(48).reshape(1, 3, 16), 0)
    found = row_losses(losses.astype(np.float32), batch.labels.numpy(), batch.rows)
    assert [(row.source, row.loss, row.trained_tokens) for row in found] == [
        ("a", 0 + 1 + 2 + 4, 4),
        ("b", 6 + 8 + 9, 3),
        ("a", 32 + 33, 2),
    ]
    empty = make([])
    assert row_losses(np.zeros((1, 1, 16), np.float32), empty.labels.numpy(), empty.rows) == []
