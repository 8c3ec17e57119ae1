"""To the first batch at a random row of a billion tokens, against reading one row group.

The set is sparse: one real file of four row groups under 240 names.
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pyarrow.parquet as pq
import torch  # noqa: F401 (its import is not what is measured)
from loader_rate import use_one_core
from report import print_table

sys.path.append(str(Path(__file__).parents[1] / "support"))

from sparse import make_sparse

from headrace.schemas.shards.manifest_file import read_manifest, write_manifest
from headrace.schemas.train.data_config import LoaderConfig
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.loader import GroupLoader
from headrace.trainer.order.data_history import open_history
from headrace.trainer.order.data_plan import plan_data
from headrace.trainer.order.position import Position
from headrace.trainer.order.sequences import open_sequences, train_stream
from headrace.trainer.shards.decoded_rows import DecodedRows
from headrace.trainer.shards.shard_reader import ShardReader

SHARDS, ROUNDS, ROWS_A_BATCH = 240, 20, 8


def first_batch(directory: Path, row: int, loader: dict[str, object]) -> int:
    """Read the manifest, find the row, make its batch; returns the row groups that were read."""
    settings = {
        "model": "none",
        "output_dir": "none",
        "datasets": [{"path": str(directory)}],
        "optimizer": {"lr": 1.0},
    }
    config = TrainConfig.model_validate(settings | {"loader": loader})
    manifest = read_manifest(directory)
    inputs = SimpleNamespace(train=[manifest], plan=plan_data(config, [manifest]))
    stream = train_stream(config, open_history(config, inputs, [], 0))
    reader = ShardReader(DecodedRows, stream)
    tokens = manifest.sequence_len
    opened = GroupLoader(
        reader,
        partial(
            open_sequences, tokens, replace(stream, loader=LoaderConfig(**loader)), reader, 1 << 40
        ),
        sequence_tokens=tokens,
        micro_batch_size=1,
        micro_batches=ROWS_A_BATCH,
        replica=0,
        replicas=1,
        prefetch=0,
    )
    opened.seek(Position(row))
    assert len(next(opened).rows) == ROWS_A_BATCH
    return reader.row_groups_read


def read_row_group(directory: Path, row: int) -> int:
    """Open a file and decode a row group with Arrow alone."""
    with pq.ParquetFile(directory / "shard-00000.parquet") as file:
        file.read_row_group(row % 4, columns=DecodedRows.COLUMNS, use_threads=False)
    return 1


def main() -> None:
    use_one_core()
    choose = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        manifest = make_sparse(directory, SHARDS)
        write_manifest(directory, manifest)
        ways: dict[str, Callable[[Path, int], int]] = {
            "pyarrow: open a file, one row group": read_row_group,
            "first batch, window of 1 row group": partial(
                first_batch, loader={"shuffle_window": 1}
            ),
            "first batch, window of 4": partial(first_batch, loader={}),
        }
        times: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            row = choose.randrange(SHARDS * 1024 // 256) * 256 + choose.randrange(200)
            for way, run in ways.items():
                started = time.perf_counter()
                read = run(directory, row)
                times[way].append((time.perf_counter() - started, read))
    middle = {way: median(seconds for seconds, _ in found) for way, found in times.items()}
    reference = middle["pyarrow: open a file, one row group"]
    print_table(
        f"{manifest.ledger.tokens_in / 1e9:.2f} G tokens, {SHARDS * 4} row groups, batch of "
        f"{ROWS_A_BATCH} rows, {ROUNDS} random offsets",
        ("", "ms, median", "ms, most", "times one row group", "row groups read, most"),
        [
            (way, f"{1e3 * middle[way]:.0f}", f"{1e3 * max(s for s, _ in found):.0f}",
             f"{middle[way] / reference:.1f}", str(max(read for _, read in found)))
            for way, found in times.items()
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
