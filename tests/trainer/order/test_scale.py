"""Seeking and memory do not depend on how much data there is."""

import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_configs import make_config
from loaders import open_loader
from ports import free_port
from sparse import make_sparse

from headrace.jobs.commands.ranks import rank_environment
from headrace.schemas.shards.manifest_file import write_manifest
from headrace.trainer.order.data_history import open_history
from headrace.trainer.order.data_plan import plan_data
from headrace.trainer.order.position import Position
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.order.sequences import train_stream
from headrace.trainer.shards.row_groups import RowGroup, RowGroups

CORPORA = (4, 400)  # shards: 16.8 million tokens, and 100 times as many
BILLION = 240  # shards of 4 row groups of 256 rows of 4,096 tokens


def open_stream(manifest, directory, **loader):
    """As a run over this one directory has it."""
    config = make_config({}, loader=loader)
    config = config.model_copy(
        update={"datasets": [config.datasets[0].model_copy(update={"path": str(directory)})]}
    )
    inputs = SimpleNamespace(train=[manifest], plan=plan_data(config, [manifest]))
    return train_stream(config, open_history(config, inputs, [], 0))


@pytest.fixture(scope="module")
def billion(tmp_path_factory):
    directory = tmp_path_factory.mktemp("billion")
    manifest = make_sparse(directory, BILLION)
    assert manifest.ledger.tokens_in > 1e9
    return manifest, directory


@pytest.mark.parametrize(
    ("loader", "packing", "row_groups"),
    [
        ({"shuffle_window": 1}, {}, [1]),
        ({}, {}, [1, 2, 3, 4]),
        ({}, {"tokens_per_row": 8192}, [4, 5, 6, 7, 8]),
    ],
    ids=["a window of one row group", "shuffled", "packed"],
)
def test_the_first_batch_at_any_offset_of_a_billion_tokens_reads_its_row_groups_alone(
    billion, loader, packing, row_groups
):
    manifest, directory = billion
    choose = random.Random(4)
    for _ in range(3):
        row = choose.randrange(BILLION * 1000) // 256 * 256 + 100  # not at a window's border
        started = time.perf_counter()
        stream = open_stream(manifest, directory, **loader)
        opened = open_loader(
            stream, None if packing else 1 << 40, 4096 * (1 + bool(packing)), **packing
        )
        opened.seek(Position(row))
        batch = next(opened)
        seconds = time.perf_counter() - started
        assert sum(len(rows) for places in batch.rows for rows in places) >= 8
        assert opened.reader.row_groups_read in row_groups
        assert seconds < 5, "the benchmark holds it to 0.3"


def test_a_batch_of_one_row_reads_one_row_group(billion):
    manifest, directory = billion
    stream = open_stream(manifest, directory)
    opened = open_loader(stream, 1 << 40, 4096, replicas=8, replica=3)
    opened.seek(Position(123_456))
    assert [len(rows) for rows in next(opened).rows[0]] == [1]
    assert opened.reader.row_groups_read == 1


def test_millions_of_row_groups_take_sixteen_bytes_each():
    columns = np.stack([np.full(3_000_000, value, dtype=np.int32) for value in (0, 1, 2, 64)])
    groups = RowGroups(columns)
    assert groups.columns.nbytes == 16 * len(groups)
    order = RowOrder(groups, seed=1, window=4)
    started = time.perf_counter()
    address = order[5 * order.rows_per_epoch + 12_345_678]
    assert time.perf_counter() - started < 10
    assert isinstance(address.row_group, RowGroup)


@pytest.mark.slow
def test_four_stages_load_in_constant_memory_whatever_the_corpus_and_the_epochs(tmp_path):
    """Summed PSS of all ranks, less what they had before they loaded anything."""
    directories = [tmp_path / str(shards) for shards in CORPORA]
    for shards, directory in zip(CORPORA, directories, strict=True):
        write_manifest(directory, make_sparse(directory, shards))
    script, output = (
        (Path(__file__).parents[2] / "support" / "memory_rank.py"),
        tmp_path / "memory.txt",
    )
    environment = rank_environment(4, free_port()) | {"DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(output), *map(str, directories)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(4)
    ]
    assert [rank.wait(timeout=250) for rank in ranks] == [0] * 4
    added = np.loadtxt(output) / 2**20  # MiB; [corpus, every 5th epoch]
    sys.stdout.write(f"MiB by corpus: {added.max(axis=1)}\n{added.round()}\n")
    assert added.shape == (2, 20)
    assert added.max() <= 512
    assert (added[:, 10:].max(axis=1) <= added[:, :10].max(axis=1) + 16).all(), "grows by epoch"
    assert added[1].max() <= added[0].max() + 48, "grows with the corpus"
