"""The same ids and masks as Axolotl's own, which `make_fixtures.py` has asked for."""

import gzip
import json
from pathlib import Path

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
    settings = dict(case["config"]) | {"rl": case["rl"]}
    length = settings.pop("sequence_len", 512)
    config = AxolotlConfig.model_validate({"type": case["type"]} | settings | case["entry"])
    rules = token_rules(spec, length, config.train_on_inputs)
    return AxolotlFormat(build_strategy(config, rules), spec, min_sample_len=1)


def ours(case, spec):
    """What becomes of each row: its samples as pairs of ids and mask, or None if it is refused."""
    records = [Record(row, Place(__file__, 0, n)) for n, row in enumerate(rows_of(case))]
    results = row_format(case, spec).encode(records)
    return [None if isinstance(r, Reject) else [shown(s) for s in r.samples] for r in results]


def shown(sample):
    sides = [(sample.ids, sample.trained)]
    if sample.rejected_ids is not None:
        sides.append((sample.rejected_ids, sample.rejected_trained))
    return [(ids.tolist(), mask(len(ids), trained)) for ids, trained in sides]


def mask(length, trained):
    return "1" * length if trained is None else "".join(map(str, trained.astype(int)))


def theirs(answer):
    """The same from Axolotl; without labels all is trained, and a row without tokens is refused."""
    if isinstance(answer, dict):
        if "chosen" in answer:  # a reward model has no labels
            return [[(answer["chosen"], None), (answer["rejected"], None)]]
        return [list(map(side, answer["pair"]))] if "pair" in answer else None
    return [[side(one)] for one in answer if one["ids"]] or None


def side(one):
    return one["ids"], one.get("trained", mask(len(one["ids"]), None))


def agree(mine, answer):
    """Whether ids are equal in order, and masks where Axolotl has them."""
    if mine is None or answer is None:
        return mine is answer
    return len(mine) == len(answer) and all(
        ids == their_ids and trained == (their_mask or trained)
        for one, their in zip(mine, answer, strict=True)
        for (ids, trained), (their_ids, their_mask) in zip(one, their, strict=True)
    )


def compare(case, spec):
    """The rows that differ, with what both make of them."""
    if "fails" in case:
        with pytest.raises(ConfigError):
            row_format(case, spec)
        return []
    triples = zip(rows_of(case), ours(case, spec), map(theirs, case["answers"]), strict=True)
    return [(row, mine, answer) for row, mine, answer in triples if not agree(mine, answer)]
