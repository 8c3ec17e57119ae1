"""The order of rows in the written shards: uniform, without memory of the input, and repeatable."""

import functools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from headrace.dataprep.prepare import prepare
from headrace.schemas.prepare.prepare_config import PrepareConfig

ROWS = 4000  # one a document, numbered in input order
SHARDS = 8


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory, tokenizer_folder):
    """For a seed, the input numbers of all rows in the order of the shards, and rows by shard."""
    folder = tmp_path_factory.mktemp("shuffle")
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    lines = (json.dumps({"text": f"{number} mill"}) + "\n" for number in range(ROWS))
    (folder / "corpus.jsonl").write_text("".join(lines))
    corpus = {"name": "mill", "type": "documents", "path": str(folder / "corpus.jsonl")}

    @functools.cache
    def shuffled(seed, name="out"):
        output = folder / f"{name}{seed}"
        config = {
            "output": str(output),
            "tokenizer": str(tokenizer_folder),
            "packing": "none",
            "shards": SHARDS,
            "evaluation_fraction": 0,
            "block_bytes": 4096,
            "seed": seed,
            "sources": [corpus],
        }
        manifest = prepare(PrepareConfig.model_validate(config), 1)
        tables = [pq.read_table(output / shard.file) for shard in manifest.shards]
        rows = [ids for table in tables for ids in table["input_ids"].to_pylist()]
        order = np.array([int(tokenizer.decode(ids).split()[0]) for ids in rows])
        return order, [shard.rows for shard in manifest.shards]

    return shuffled


def chi_square(table):
    """The statistic of a table of counts against equal ones, in deviations from what is usual."""
    expected = table.mean()
    statistic = ((table - expected) ** 2 / expected).sum()
    freedom = table.size - 1 - sum(side - 1 for side in table.shape) * (table.ndim > 1)
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_from_anywhere_in_the_input_lie_anywhere_in_the_output(seed, shuffled):
    order, _ = shuffled(seed)
    assert sorted(order) == list(range(ROWS))
    parts = 20
    places = np.arange(ROWS) * parts // ROWS
    table = np.zeros((parts, parts))
    np.add.at(table, (order * parts // ROWS, places), 1)
    assert -5 < chi_square(table) < 5  # much below would be too even


@pytest.mark.parametrize("seed", [0, 1])
def test_neighbors_in_the_output_are_strangers_in_the_input(seed, shuffled):
    order, _ = shuffled(seed)
    distances = np.abs(np.diff(order)) / ROWS
    expected = 1 / 3  # of two uniform places, with a standard deviation of sqrt(1/18)
    assert abs(distances.mean() - expected) < 4 * (1 / 18 / len(distances)) ** 0.5
    assert (np.diff(order) == 1).sum() <= 8  # about 1 by chance
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 4 / ROWS**0.5


def test_shards_get_equal_shares_by_chance(shuffled):
    _, counts = shuffled(0)
    assert -4 < chi_square(np.array(counts)) < 5


def test_the_same_seed_repeats_and_another_gives_an_unrelated_order(shuffled):
    first, _ = shuffled(0)
    assert np.array_equal(shuffled(0, "again")[0], first)
    other, _ = shuffled(1)
    assert sorted(other) == sorted(first)
    assert (first == other).sum() <= 8  # about 1 by chance
    assert abs(np.corrcoef(np.argsort(first), np.argsort(other))[0, 1]) < 4 / ROWS**0.5
