"""The loader against torch's DataLoader over a `datasets` table, and MosaicML's StreamingDataset.

The same rows in the same batches, with ids, labels and where documents end, on one core; and the
memory that loading adds to four ranks, their workers included. The others read ready-made labels,
and nothing of theirs is compressed: 8 bytes a token, in the page cache. Rates are without workers,
which would be other cores; memory is measured both without and with two a rank, as most use them.
Needs `pip install datasets mosaicml-streaming`, which Headrace itself does not; without them it
says so.
A rank is this file again as `loader_peers.py WAY FOLDER WORKERS`.
"""

import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from loader_rate import SEQUENCE_LEN, loader_alone, use_one_core
from ports import free_port
from report import MODEL, print_table, text_config
from torch.utils.data import DataLoader

from headrace.dataprep.prepare import prepare
from headrace.jobs.commands.ranks import rank_environment
from headrace.schemas.train.parallel_dims import ParallelDims
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.batch import Batch
from headrace.trainer.batches.feed import Feed
from headrace.trainer.batches.loader_builder import build_train_loader
from headrace.trainer.messages import gather
from headrace.trainer.order.data_history import open_history
from headrace.trainer.parallel import RankLayout, connect
from headrace.trainer.preflight import check

ROWS_A_BATCH, RANKS, ROUNDS = 8, 4, 3
WORKERS = (0, 2)  # of each rank's DataLoader
REPEATS = 36  # of the text: a GiB of ids and labels
BATCHES, CHECKED = 2000, 20  # of a round; of those that are compared first
COLUMNS = ["input_ids", "labels", "document_lengths"]
# ids and labels, [b, s] int32, and the lengths of each row's documents
Batches = Iterator[tuple[torch.Tensor, torch.Tensor, list[list[int]]]]


def make_config(folder: Path, stages: int = 1, shuffle: bool = True) -> TrainConfig:
    """One epoch of all repeats."""
    settings = {
        "model": str(MODEL),
        "output_dir": "unused",
        "pipeline_stages": stages,
        "micro_batch_size": ROWS_A_BATCH,
        "datasets": [{"path": str(folder / "shards"), "repeats": REPEATS}],
        "optimizer": {"lr": 1e-4},
        "loader": {"shuffle": shuffle},
    }
    return TrainConfig.model_validate(settings)


def load(folder: Path, shuffle: bool = True) -> Iterator[Batch]:
    """One epoch, shuffled or in file order."""
    return loader_alone(make_config(folder, shuffle=shuffle), torch.device("cpu"))


def keys_of(batch: Batch) -> list[int]:
    return [row.row_key for places in batch.rows for place in places for row in place]


def write_peers(folder: Path) -> int:
    """All rows as an Arrow file in file order, and as MDS shards in the loader's order.

    Also writes which row of the table is the loader's i-th. Returns the number of rows.
    """
    from streaming import MDSWriter

    fields = [pa.field(name, pa.list_(pa.int32())) for name in COLUMNS]
    places: dict[int, deque[int]] = defaultdict(deque)
    written = 0
    with (
        pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, pa.schema(fields)) as table,
    ):
        for batch in load(folder, shuffle=False):
            for key in keys_of(batch):
                places[key].append(written)
                written += 1
            columns = [
                pa.array(column, pa.list_(pa.int32()))
                for column in zip(*rows_of(batch), strict=True)
            ]
            table.write_batch(pa.record_batch(columns, names=COLUMNS))
    order = []
    with MDSWriter(out=str(folder / "mds"), columns=dict.fromkeys(COLUMNS, "ndarray:int32")) as mds:
        for batch in load(folder):
            order += [places[key].popleft() for key in keys_of(batch)]
            for row in rows_of(batch):
                mds.write(dict(zip(COLUMNS, row, strict=True)))
    np.save(folder / "order.npy", order)
    return len(order)


def rows_of(batch: Batch) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The columns of each row, filled up to the place."""
    arrays = zip(
        batch.input_ids[0].numpy(),
        batch.labels[0].numpy(),
        (np.array(lengths, np.int32) for lengths in batch.document_lengths[0]),
        strict=True,
    )
    return list(islice(arrays, len(keys_of(batch))))


def headrace(folder: Path) -> Batches:
    """The loader; labels are made while loading."""
    return (
        (batch.input_ids[0], batch.labels[0], batch.document_lengths[0]) for batch in load(folder)
    )


def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """As training scripts do."""
    ids, labels = (
        torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in COLUMNS[:2]
    )
    return ids, labels, [row["document_lengths"].tolist() for row in rows]


def torch_datasets(
    folder: Path,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    form: str = "torch",
    dtype: Any = torch.int32,
) -> Batches:
    """A memory-mapped table; every rank opens it and takes its batches."""
    from datasets import Dataset

    table = Dataset.from_file(str(folder / "rows.arrow")).with_format(form, dtype=dtype)
    order = np.load(folder / "order.npy").tolist()
    batches = [
        order[first : first + ROWS_A_BATCH]
        for first in range(rank * ROWS_A_BATCH, len(order), ranks * ROWS_A_BATCH)
    ]
    return iter(DataLoader(table, batch_sampler=batches, collate_fn=collate, num_workers=workers))


def mosaic(folder: Path, rank: int = 0, ranks: int = 1, workers: int = 0) -> Batches:
    """MDS shards that lie in the wished order and are not compressed, which suits it best."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder / "mds"), batch_size=ROWS_A_BATCH, shuffle=False)
    return iter(
        DataLoader(dataset, batch_size=ROWS_A_BATCH, collate_fn=collate, num_workers=workers)
    )


WAYS: dict[str, Callable[..., Batches]] = {
    "headrace": headrace,
    "DataLoader over datasets": torch_datasets,
    "DataLoader, as numpy": partial(torch_datasets, form="numpy", dtype=np.int32),
    "StreamingDataset": mosaic,
}

LIBRARIES = {
    "headrace": ["pyarrow.parquet"],
    "DataLoader over datasets": ["datasets"],
    "DataLoader, as numpy": ["datasets"],
    "StreamingDataset": ["streaming"],
}


def rate(batches: Batches) -> float:
    """Tokens a second of processor time, of all threads, after the first batch; checks sizes."""
    next(batches)
    started = time.process_time()
    tokens = sum(ids.numel() for ids, *_ in islice(batches, BATCHES))
    assert tokens == BATCHES * ROWS_A_BATCH * SEQUENCE_LEN
    return tokens / (time.process_time() - started)


def rank_memory(way: str, folder: Path, workers: int) -> None:
    """Print what loading adds to the PSS of all ranks over an epoch, in bytes."""
    layout = connect(ParallelDims(stages=RANKS))
    for name in LIBRARIES[way]:
        importlib.import_module(name)
    before = memory_of(layout)
    peak = 0
    for number, _ in enumerate(part_of(way, folder, layout, workers)):
        if number % 100 == 99:
            peak = max(peak, memory_of(layout))
    peak = max(peak, memory_of(layout))
    if layout.rank == 0:
        sys.stdout.write(json.dumps({"added": peak - before}) + "\n")


def part_of(way: str, folder: Path, layout: RankLayout, workers: int) -> Iterator[Any]:
    """What a rank sees: as a stage of one pipeline group, or as a rank with a loader of its own."""
    if way != "headrace":
        batches = WAYS[way](folder, layout.rank, RANKS, workers)
        return islice(batches, len_of(folder) // ROWS_A_BATCH // RANKS)
    config = make_config(folder, stages=RANKS)
    inputs = check(config, RANKS)
    data_history = open_history(config, inputs, history=[], first_row=0)
    stop_row = data_history.pieces[-1].end(1)
    feed = Feed(layout, build_train_loader(config, inputs, layout, data_history, stop_row))
    return (feed.next() for _ in range(len_of(folder) // ROWS_A_BATCH))


def len_of(folder: Path) -> int:
    """Rows of the epoch."""
    return len(np.load(folder / "order.npy", mmap_mode="r"))


def memory_of(layout: RankLayout) -> int:
    """PSS of all ranks and their workers, in bytes."""
    me = psutil.Process()
    mine = sum(process.memory_full_info().pss for process in [me, *me.children(recursive=True)])
    return sum(gather(mine, layout.world_group))


def memory(way: str, folder: Path, workers: int) -> float:
    """MiB that loading adds to four ranks in all."""
    environment = rank_environment(RANKS, free_port()) | {"DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, way, str(folder), str(workers)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS
    return float(json.loads(outputs[0].splitlines()[-1])["added"]) / (1 << 20)


def main() -> None:
    missing = [name for name in ("datasets", "streaming") if importlib.util.find_spec(name) is None]
    if missing:
        print_table("not run: pip install datasets mosaicml-streaming", ("missing",), [missing[:1]])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = text_config(folder / "shards", 1, SEQUENCE_LEN)
        prepare(config, workers=1)
        rows = write_peers(folder)
        every = [way(folder) for way in WAYS.values()]
        for ours, *others in islice(zip(*every, strict=False), CHECKED):
            for other in others:
                assert torch.equal(ours[0], other[0]), "other rows"
                assert torch.equal(ours[1], other[1]), "other labels"
                assert ours[2] == other[2], "other documents"
        added = {way: [memory(way, folder, workers) for workers in WORKERS] for way in WAYS}
        use_one_core()
        rounds = [[rate(way(folder)) for way in WAYS.values()] for _ in range(ROUNDS)]
    rates = [median(column) for column in zip(*rounds, strict=True)]
    print_table(
        f"{rows:,} rows of {SEQUENCE_LEN}, batches of {ROWS_A_BATCH}, one core, median of {ROUNDS}",
        ("", "M tokens/s", "headrace is times as fast"),
        [
            (way, f"{rate / 1e6:.1f}", f"{rates[0] / rate:.1f}")
            for way, rate in zip(WAYS, rates, strict=True)
        ],
    )
    ours = max(added["headrace"])
    print_table(
        f"MiB (PSS) that loading adds to {RANKS} ranks and their workers over an epoch, and the "
        "share of it that headrace needs",
        ("", *(f"{workers} workers a rank" for workers in WORKERS)),
        [
            (way, *(f"{mebibytes:,.0f} ({ours / mebibytes:.2f})" for mebibytes in measured))
            for way, measured in added.items()
        ],
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rank_memory(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
