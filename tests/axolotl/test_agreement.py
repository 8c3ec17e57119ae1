"""The same ids and masks as Axolotl's own, which `make_fixtures.py` has asked for."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.dataprep.axolotl.build import build_strategy
from headrace.dataprep.axolotl.strategy import AxolotlFormat, token_rules
from headrace.dataprep.records import Record, Reject
from headrace.dataprep.streams import Place
from headrace.dataprep.tokenizer import read_spec
from headrace.schemas.axolotl_config import AxolotlConfig
from headrace.schemas.errors import ConfigError
from headrace.schemas.prepare_config import PrepareConfig

with gzip.open(Path(__file__).with_name("golden.jsonl.gz"), "rt", encoding="utf-8") as lines:
    HEADER, *CASES = map(json.loads, lines)


@pytest.fixture(scope="session", params=HEADER["tokenizers"])
def tokenizer(request, tmp_path_factory):
    """One of the small tokenizers: its name, and what workers are told of it."""
    folder = tmp_path_factory.mktemp(request.param)
    for name, text in HEADER["tokenizers"][request.param].items():
        (folder / name).write_text(text, encoding="utf-8")
    source = {"name": "x", "type": "text", "path": "x"}
    config = PrepareConfig(output="x", tokenizer=str(folder), sources=[source])
    return request.param, read_spec(config)


def rows_of(case):
    name, _, part = case["rows"].partition(".")
    rows = HEADER["rows"][name]
    return [row[part] | {"system": row["system"]} for row in rows] if part else rows


def row_format(case, spec):
    settings = dict(case["config"])
    length = settings.pop("sequence_len", 512)
    config = AxolotlConfig.model_validate({"type": case["type"]} | settings | case["entry"])
    rules = token_rules(spec, length, config.train_on_inputs)
    return AxolotlFormat(build_strategy(config, rules), spec, min_sample_len=1)


def ours(case, spec):
    """Samples of each row, or its reject."""
    try:
        records = [Record(row, Place(__file__, 0, n)) for n, row in enumerate(rows_of(case))]
        return list(row_format(case, spec).encode(records))
    except ConfigError as error:
        return error


def shown(sample):
    trained = np.ones(len(sample.ids), bool) if sample.trained is None else sample.trained
    return {"ids": sample.ids.tolist(), "trained": "".join(map(str, trained.astype(int)))}


def theirs(answer):
    """Axolotl's samples; without labels all is trained."""
    return [
        {"ids": one["ids"], "trained": one.get("trained", "1" * len(one["ids"]))}
        for one in answer
        if one["ids"]
    ]


def compare(case, spec):
    """Every difference, as (row, ours, theirs)."""
    found = ours(case, spec)
    if "fails" in case:
        return [] if isinstance(found, ConfigError) else [(case["rows"], found, case["fails"])]
    if isinstance(found, ConfigError):
        return [(case["rows"], found, "rows")]
    differences = []
    for row, mine, answer in zip(rows_of(case), found, case["answers"], strict=True):
        wanted = [] if isinstance(answer, dict) else theirs(answer)
        if isinstance(mine, Reject):
            if wanted:
                differences.append((row, mine, wanted))
        elif [shown(sample) for sample in mine.samples] != wanted:
            differences.append((row, [shown(sample) for sample in mine.samples], answer))
    return differences
