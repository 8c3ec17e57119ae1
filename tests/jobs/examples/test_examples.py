"""Every example is complete: it loads, its halves fit together, and it trains in small."""

import json
import sys
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import complete

from headrace.dataprep.prepare import prepare
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig

FOLDER = Path(__file__).parents[3] / "jobs" / "examples"
TRAINED = sorted(FOLDER.glob("*-train.toml"))
NAMES = [path.name.removesuffix("-train.toml") for path in TRAINED]
NEED_EXPERTS = {"experts"}  # the tiny model has none
TEXT = "The mill wheel turns the stone, and the stone grinds the grain into flour. "


def row(number: int, name: str) -> dict:
    """Return one row with the fields of every kind of example."""
    question, answer = f"What turns, number {number}?", f"The wheel {number}."
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        "question": question, "answer": answer,
        "instruction": question, "input": "", "output": answer,
        "prompt": f"{question} ", "chosen": answer, "rejected": "Nothing.",
        "text": f"{name} {number} {TEXT}", "content": f"{name} {number} {TEXT}",
    }  # fmt: skip


def prepared(name: str) -> list[Path]:
    """Return the configs that prepare an example's data."""
    return sorted(FOLDER.glob(f"{name}-prepare*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_both_halves_load_and_fit_together(name):
    train = load_config(TrainConfig, FOLDER / f"{name}-train.toml")
    outputs = [load_config(PrepareConfig, path).output for path in prepared(name)]
    assert {dataset.path for dataset in train.datasets} == set(outputs)
    assert {dataset.path for dataset in train.evaluation_datasets} <= set(outputs)
    for path in prepared(name):
        assert load_config(PrepareConfig, path).tokenizer == train.model


def test_the_page_lists_every_example():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"| `{name}` |" not in page] == []
    assert len(NAMES) >= 11


def write_data(folder: Path, source: dict) -> str:
    """Write a little data of a source's kind; returns what names it."""
    rows = [row(number, source["name"]) for number in range(60)]
    if source["type"] == "text":
        for number in range(30):
            (folder / f"{number}.txt").write_text(f"{number} {TEXT * 4}")
        return str(folder / "*.txt")
    if source["path"].endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        return str(folder / "rows.parquet")
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    return str(folder / "rows.jsonl")


def run_small(name: str, model: Path, folder: Path) -> Path:
    """Prepare and train an example with a tiny model, short rows and one step."""
    moved = {}
    for number, path in enumerate(prepared(name)):
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        place = folder / f"data-{number}"
        place.mkdir()
        for source in values["sources"]:
            source["path"] = write_data(place, source)
            source.pop("max_tokens", None)
        shards = folder / f"shards-{number}"
        moved[values["output"]] = str(shards)
        changes = {"output": str(shards), "tokenizer": str(model), "sequence_len": 128, "shards": 2}
        changes |= {"evaluation_fraction": 0.3, "row_group_tokens": 512}
        prepare(PrepareConfig.model_validate(values | changes), workers=1)
    values = tomllib.loads((FOLDER / f"{name}-train.toml").read_text(encoding="utf-8"))
    config = folder / "train.toml"
    text = (FOLDER / f"{name}-train.toml").read_text(encoding="utf-8")
    for old, new in moved.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    config.write_text(text.replace("epochs = 2\n", ""))
    stages = values.get("pipeline_stages", 1)
    sets = {"model": str(model), "output_dir": str(folder / "run"), "threads": 1}
    sets |= {"max_steps": 1, "gradient_accumulation_steps": stages}
    options = [
        part for key, value in sets.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]
    command = [sys.executable, "-m", "headrace.jobs.cli", "train", str(config)]
    done = complete([*command, "--gpus", str(stages), *options])
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return folder / "run"


SHORT = ("dpo", "mixture-of-data")
SMALL = [name for name in NAMES if name not in NEED_EXPERTS]


@pytest.mark.parametrize(
    "name",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.exhaustive) for name in SMALL],
)
def test_it_trains_in_small(name, chat_model, tmp_path):
    run = run_small(name, chat_model, tmp_path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1]
    assert (run / "adapter").is_dir() or (run / "model").is_dir()
