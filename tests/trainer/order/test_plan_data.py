"""`headrace plan-data` tells what a run sees, reads what it reads, and needs no torch."""

import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from headrace.jobs.commands.plan_data import plan_data, plan_sources, sparkline
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.loader_builder import build_train_loader
from headrace.trainer.order.data_history import open_history
from headrace.trainer.order.position import Position
from headrace.trainer.order.run_length import find_run_length
from headrace.trainer.parallel import RankLayout
from headrace.trainer.preflight import check
from headrace.trainer.shards.packed_rows import places_in_order, rows_digest, tokens_by_source

MIXED = ["mixing=interleave", "max_steps=40", "loader.pack=best_fit", "loader.tokens_per_row=200"]


def plan(config, picture=None, table=None):
    console = Console(file=io.StringIO(), width=100)
    steps = plan_data(config, 1, console, picture, table)
    return steps, console.file.getvalue()


@pytest.mark.parametrize("settings", [["epochs=2"], MIXED], ids=["epochs", "packed mixture"])
def test_the_plan_is_what_the_loader_then_gives_and_reads(training, tiny_shards, settings):
    text = training.config.read_text().replace("max_steps = 10\n", "")
    extra = f'[[datasets]]\npath = "{tiny_shards}"\nweight = 1.0\n'
    training.config.write_text(text.replace("[adapter]", f"{extra}[adapter]"))
    config = load_config(TrainConfig, training.config, [*settings, "loader.prefetch_batches=0"])
    steps, printed = plan(config)

    inputs = check(config, 1)
    data_history = open_history(config, inputs, [], 0)
    run_length = find_run_length(config, inputs, data_history, 0, Position())
    layout = RankLayout(torch.device("cpu"))
    loader = build_train_loader(config, inputs, layout, data_history, run_length.stop_row)
    assert len(steps) == run_length.total_steps > 5
    for step in steps:
        batch = next(loader)
        rows = [row for place in places_in_order([batch.rows]) for row in place]
        assert rows_digest(rows) == step.rows_sha256
        assert (batch.tokens, tokens_by_source(rows)) == (step.tokens, step.source_tokens)
        assert batch.position.next_row == step.next_row
        assert loader.reader.row_groups_read == step.row_groups_read
        assert loader.reader.bytes_read == step.bytes_read
    assert f"steps        {len(steps)} of 4 sequences of {inputs.sequence_tokens}" in printed


def test_the_steps_and_a_picture_are_written_when_asked_for(training, tmp_path):
    config = load_config(TrainConfig, training.config, [])
    picture, table = tmp_path / "mixture.png", tmp_path / "steps.jsonl"
    steps, printed = plan(config, picture, table)
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    assert [line["rows_sha256"] for line in lines] == [step.rows_sha256 for step in steps]
    assert f"{table}: written" in printed.replace("\n", "")


def test_planning_leaves_torch_unloaded(training):
    program = (
        "import sys\n"
        "from headrace.jobs import cli\n"
        f"try: cli.main(['plan-data', {str(training.config)!r}])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_shares_are_drawn_from_nothing_to_all():
    assert sparkline([0, 0.01, 0.13, 0.5, 0.99, 1]) == " ▁▂▅██"


def test_a_source_that_comes_late_has_no_share_before(training):
    steps, _ = plan(load_config(TrainConfig, training.config, []))
    steps = [
        type(step)(**{**vars(step), "source_tokens": {"b" if step.step > 5 else "a": step.tokens}})
        for step in steps
    ]
    early, late = plan_sources(steps)
    assert (early.name, early.shares) == ("a", [1.0] * 5 + [0.0] * 5)
    assert late.tokens == sum(step.tokens for step in steps[5:])
