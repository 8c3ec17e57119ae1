"""A tiny real tokenizer, small corpora, and short ways to prepare and to compare."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from headrace.dataprep.prepare import prepare
from headrace.schemas.manifest import Manifest
from headrace.schemas.prepare_config import PrepareConfig

WORDS = "water wheel mill race stone grain flour river gate sluice timber axle gear".split()


def write_tokenizer(folder: Path, adds_bos: bool = False) -> Path:
    """A byte-level BPE tokenizer, trained on the spot: it gives back every text unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 8, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "plain")


@pytest.fixture(scope="session")
def bos_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bos", adds_bos=True)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two hundred small text files in `corpus/` of the working directory, which is temporary."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(200):
        words = (WORDS[(number * 7 + step * step) % len(WORDS)] for step in range(20 + number))
        (folder / f"{number:03d}.txt").write_text(f"{number} " + " ".join(words))
    return folder


@pytest.fixture
def make_config(tokenizer_folder: Path) -> Callable[..., PrepareConfig]:
    """A config over `corpus/*.txt` with small blocks, rows and row groups; keywords change it."""

    def make(output: str = "out", **changes: Any) -> PrepareConfig:
        values: dict[str, Any] = {
            "output": output,
            "tokenizer": str(tokenizer_folder),
            "sequence_len": 64,
            "shards": 3,
            "evaluation_fraction": 0.1,
            "block_bytes": 1 << 14,
            "row_group_tokens": 1024,
            "sources": [{"name": "mill", "type": "text", "path": "corpus/*.txt"}],
        }
        return PrepareConfig.model_validate(values | changes)

    return make


@pytest.fixture
def run() -> Callable[..., Manifest]:
    """`prepare` in this process, unless told otherwise, without anything on the terminal."""

    def run(config: PrepareConfig, workers: int = 1) -> Manifest:
        return prepare(config, workers, Console(file=io.StringIO()))

    return run


@pytest.fixture
def snapshot() -> Callable[[str], dict[str, bytes]]:
    """Every file of a directory with its bytes."""

    def snapshot(directory: str) -> dict[str, bytes]:
        paths = sorted(path for path in Path(directory).rglob("*") if path.is_file())
        return {str(path.relative_to(directory)): path.read_bytes() for path in paths}

    return snapshot


@pytest.fixture
def rows_of() -> Callable[..., list[dict[str, Any]]]:
    """The rows of one split of a shard directory, in file order."""

    def rows_of(directory: str, split: str = "train") -> list[dict[str, Any]]:
        stem = {"train": "shard", "evaluation": "evaluation"}[split]
        paths = sorted(Path(directory).glob(f"{stem}-*.parquet"))
        return [row for path in paths for row in pq.read_table(path).to_pylist()]

    return rows_of


@pytest.fixture
def documents_of(
    tokenizer_folder: Path, rows_of: Callable[..., list[dict[str, Any]]]
) -> Callable[[str], list[str]]:
    """The texts of all documents that lie whole in one row, sorted: enough for small documents."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))

    def documents_of(directory: str) -> list[str]:
        found = []
        for split in ("train", "evaluation"):
            for row in rows_of(directory, split):
                start = 0
                for length in row["document_lengths"]:
                    found.append(tokenizer.decode(row["input_ids"][start : start + length]))
                    start += length
        return sorted(found)

    return documents_of


@pytest.fixture
def mixed_config(corpus, make_config):
    """Text and documents, plain, compressed and partly refused, in many small tasks."""
    records = [json.dumps({"text": path.read_text() * 2}) for path in sorted(corpus.glob("1*"))]
    (corpus / "records.jsonl").write_text("\n".join([*records[:50], "{broken", *records[50:]]))
    with gzip.open(corpus / "more.jsonl.gz", "wt") as file:
        file.write("\n".join(records[::3]))
    documents = ["corpus/records.jsonl", "corpus/more.jsonl.gz"]
    sources = [
        {"name": "mill", "type": "text", "path": "corpus/*.txt"},
        {"name": "records", "type": "documents", "path": documents},
    ]

    def mixed_config(output, **changes):
        values = {"block_bytes": 1 << 14, "max_reject_fraction": 0.1, "sources": sources}
        return make_config(output, **(values | changes))

    return mixed_config


@pytest.fixture
def run_on(snapshot):
    """`prepare` on an engine, without anything on the terminal; gives the bytes."""

    def run_on(engine, config):
        prepare(config, 1, Console(file=io.StringIO()), engine)
        return snapshot(config.output)

    return run_on


@pytest.fixture(scope="session")
def spark():
    """Spark on two cores of this machine; it takes seconds to start."""
    spark_engine = pytest.importorskip("headrace.dataprep.spark_engine")
    with spark_engine.SparkEngine(2) as engine:
        yield engine
