"""A tiny real tokenizer, small corpora, and short ways to prepare and to compare."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from headrace.dataprep.prepare import prepare
from headrace.dataprep.work.budgets import Budgets
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.shards.manifest import Manifest

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

    def run(config: PrepareConfig, workers: int = 1, **budgets: int) -> Manifest:
        return prepare(config, workers, budgets=Budgets(**budgets))

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


TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"


def write_lines(path: Path, rows: list[Any]) -> None:
    """JSONL, compressed where the name says so."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.write("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Parquet of small row groups."""
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20)


def causal_sources(corpus: Path, texts: list[str]) -> list[dict[str, Any]]:
    """Every type of source: plain, compressed and tables; some rows refused, repeated or long."""
    questions = [" ".join(text.split()[:9]) for text in texts]
    records: list[Any] = [{"text": " ".join(text.split()[::-1])} for text in texts[50:]]
    write_lines(corpus / "records.jsonl", [*records[:50], "{broken", *records[50:]])
    write_lines(corpus / "more.jsonl.gz", records[::3])
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": text[::2]}]
        for question, text in zip(questions, texts, strict=True)
    ]
    write_lines(
        corpus / "chats.jsonl", [{"messages": chat} for chat in [*chats[:60], [], *chats[40:]]]
    )
    (corpus / "template.jinja").write_text(TEMPLATE)
    alpaca = [
        {"instruction": question, "input": text[:20] * (number % 2), "output": text[5:400]}
        for number, (question, text) in enumerate(zip(questions, texts, strict=True))
    ]
    write_lines(corpus / "alpaca.jsonl", alpaca)
    write_table(corpus / "completion.parquet", [{"text": text[300::-1]} for text in texts[:90]])
    numbered = [[2 + (number * step) % 250 for step in range(5 + number)] for number in range(80)]
    write_table(
        corpus / "ids.parquet",
        [
            {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}
            for ids in [*numbered, *numbered[:9]]
        ],
    )
    documents = ["corpus/records.jsonl", "corpus/more.jsonl.gz"]
    return [
        {"name": "mill", "type": "text", "path": "corpus/*.txt"},
        {"name": "records", "type": "documents", "path": documents},
        {
            "name": "chats",
            "type": "chat",
            "path": "corpus/chats.jsonl",
            "chat": {"template": "corpus/template.jinja"},
        },
        {
            "name": "alpaca",
            "type": "axolotl",
            "path": "corpus/alpaca.jsonl",
            "axolotl": {"type": "alpaca"},
        },
        {
            "name": "completion",
            "type": "axolotl",
            "path": "corpus/completion.parquet",
            "axolotl": {"type": "completion"},
        },
        {"name": "ids", "type": "pretokenized", "path": "corpus/ids.parquet"},
    ]


def preference_sources(corpus: Path, texts: list[str]) -> list[dict[str, Any]]:
    """Pairs as texts, some of them refused or repeated, and pairs as Axolotl reads them."""
    pairs: list[Any] = [
        {"prompt": text[:30], "chosen": text[30:300], "rejected": text[60:200]} for text in texts
    ]
    write_lines(corpus / "pairs.jsonl", [*pairs[:50], "{broken", *pairs[20:]])
    intel = [
        {"question": text[:40], "chosen": text[40:240], "rejected": text[90:150]} for text in texts
    ]
    write_table(corpus / "dpo.parquet", intel)
    return [
        {"name": "pairs", "type": "preference", "path": "corpus/pairs.jsonl"},
        {
            "name": "dpo",
            "type": "axolotl",
            "path": "corpus/dpo.parquet",
            "axolotl": {"type": "chatml.intel", "rl": "dpo"},
        },
    ]


@pytest.fixture
def mixed_config(corpus, make_config):
    """All sources of a kind in many small tasks, with a filter and both searches for duplicates."""
    numbers = random.Random(0)
    texts = [" ".join(numbers.choices(WORDS, k=20 + place)) for place in range(150)]
    for place, text in enumerate(texts):
        (corpus / f"{place:03d}.txt").write_text(text)
    sources = {
        "causal": causal_sources(corpus, texts),
        "preference": preference_sources(corpus, texts),
    }

    def mixed_config(output, kind="causal", **changes):
        values = {
            "sources": sources[kind],
            "block_bytes": 1 << 14,
            "max_reject_fraction": 0.1,
            "filters": {"min_tokens": 12},
            "deduplicate": {"exact": True, "near": True},
        }
        if kind == "causal":
            values["packing"] = "concatenate"  # every chat is longer than a row
        return make_config(output, **(values | changes))

    return mixed_config


@pytest.fixture
def run_on(snapshot):
    """`prepare` on an engine, without anything on the terminal; gives the bytes."""

    def run_on(engine, config, **budgets):
        prepare(config, 1, engine=engine, budgets=Budgets(**budgets))
        return snapshot(config.output)

    return run_on


@pytest.fixture(scope="session")
def spark():
    """Spark on two cores of this machine; it takes seconds to start."""
    spark_engine = pytest.importorskip("headrace.dataprep.work.spark_engine")
    with spark_engine.SparkEngine(2) as engine:
        yield engine
