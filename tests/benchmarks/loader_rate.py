"""One pipeline group's loader against Parquet reading alone, on one core."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from report import MODEL, peak_gib, print_table, text_config

from headrace.dataprep.prepare import prepare
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.shard_format import TRAIN
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.loader import GroupLoader
from headrace.trainer.batches.loader_builder import build_train_loader
from headrace.trainer.order.data_history import open_history
from headrace.trainer.order.position import Position
from headrace.trainer.order.run_length import find_run_length
from headrace.trainer.parallel import RankLayout
from headrace.trainer.preflight import check
from headrace.trainer.shards.decoded_rows import DecodedRows
from headrace.trainer.shards.token_pages import read_struct, token_column

ROUNDS = 3
COPIES = 3  # of the text: enough row groups that the shuffle window moves on
SEQUENCE_LEN = 4096


def use_one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


def read_parquet(directory: Path, manifest: Manifest) -> Iterator[int]:
    """Decode every row group to Arrow, in file order; yields the tokens of each."""
    for shard in manifest.split(TRAIN):
        with pq.ParquetFile(directory / shard.file, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=DecodedRows.COLUMNS, use_threads=False)
                yield sum(len(chunk.values) for chunk in table["input_ids"].chunks)


def decompress(directory: Path, manifest: Manifest) -> Iterator[int]:
    """Only zstd, and only the pages of the ids: no reader of these shards can be faster."""
    for shard in manifest.split(TRAIN):
        content = memoryview((directory / shard.file).read_bytes())
        metadata = pq.read_metadata(directory / shard.file)
        for group in range(metadata.num_row_groups):
            column = token_column(metadata.row_group(group))
            assert column is not None
            header, start = read_struct(content, column.data_page_offset)
            pa.decompress(content[start : start + header[3]], header[2], "zstd")
            assert header[5][1] == column.num_values, "it has more than one page"
            yield column.num_values


def load(directory: Path, prefetch: int, pack: str = "none") -> Iterator[int]:
    """One shuffled epoch of batches of 8 rows, labels included; yields the tokens of each."""
    settings = {
        "model": str(MODEL),
        "output_dir": "unused",
        "gradient_accumulation_steps": 8,
        "datasets": [{"path": str(directory)}],
        "optimizer": {"lr": 1e-4},
        "loader": {"prefetch_batches": prefetch, "pack": pack},
    }
    loader = loader_alone(TrainConfig.model_validate(settings), torch.device("cpu"))
    return (batch.tokens for batch in loader)


def loader_alone(config: TrainConfig, device: torch.device) -> GroupLoader:
    """The trainer's loader for one process, without a process group."""
    alone = RankLayout(device)
    inputs = check(config, processes=1)
    data_history = open_history(config, inputs, history=[], first_row=0)
    run_length = find_run_length(config, inputs, data_history, 0, Position())
    loader = build_train_loader(config, inputs, alone, data_history, run_length.stop_row)
    assert loader is not None
    return loader


def rate(tokens: Iterator[int]) -> float:
    """Tokens a second, less what making the iterator took."""
    started = time.perf_counter()
    return sum(tokens) / (time.perf_counter() - started)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "shards"
        manifest = prepare(text_config(directory, COPIES, SEQUENCE_LEN), workers=1)
        documents = Path(folder) / "documents"
        unpacked = text_config(documents, COPIES, SEQUENCE_LEN).model_copy(
            update={"packing": "none", "overlong": "split"}
        )
        prepare(unpacked, workers=1)
        use_one_core()
        ways: dict[str, Callable[[], Iterator[int]]] = {
            "pyarrow alone, file order": lambda: read_parquet(directory, manifest),
            "zstd alone": lambda: decompress(directory, manifest),
            "loader, in line": lambda: load(directory, prefetch=0),
            "loader, 2 batches ahead": lambda: load(directory, prefetch=2),
            "loader, a document a row": lambda: load(documents, prefetch=2),
            "loader, packing those": lambda: load(documents, prefetch=2, pack="best_fit"),
        }
        rounds = [[rate(way()) for way in ways.values()] for _ in range(ROUNDS)]
    rates = [median(column) for column in zip(*rounds, strict=True)]
    groups = sum(len(shard.row_groups) for shard in manifest.split(TRAIN))
    print_table(
        f"{manifest.ledger.tokens_out[TRAIN] / 1e6:.1f} M tokens, rows of {SEQUENCE_LEN}, "
        f"{groups} row groups, one core, median of {ROUNDS}; peak {peak_gib():.2f} GiB",
        ("", "M tokens/s", "of pyarrow's rate"),
        [
            (name, f"{rate / 1e6:.1f}", f"{rate / rates[0]:.2f}")
            for name, rate in zip(ways, rates, strict=True)
        ],
    )


if __name__ == "__main__":
    main()
