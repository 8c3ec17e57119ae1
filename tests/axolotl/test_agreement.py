"""The same ids and masks as Axolotl's own, which `make_fixtures.py` has asked for."""

import gzip
import json
import random
from pathlib import Path

import pytest

from headrace.dataprep.axolotl.build import REFUSED, build_strategy, token_rules
from headrace.dataprep.axolotl.row_format import AxolotlFormat
from headrace.dataprep.input.records import Place, Record, Reject
from headrace.dataprep.text.row_format import Encoded
from headrace.dataprep.text.tokenizer_spec import read_spec
from headrace.schemas.errors import ConfigError
from headrace.schemas.prepare.axolotl_config import AxolotlConfig
from headrace.schemas.prepare.prepare_config import PrepareConfig

with gzip.open(Path(__file__).with_name("golden.jsonl.gz"), "rt", encoding="utf-8") as lines:
    HEADER, *CASES = map(json.loads, lines)


PLACEHOLDERS = ("[[dummy_message]]", "zzdummymessagezz")
INTENDED = {  # docs/axolotl.md has the reasons
    "a null solution counts as none": lambda case, row: (
        "solution" in row and row["solution"] is None
    ),
    "a content may be Axolotl's placeholder": lambda case, row: any(
        turn.get("content", turn.get("value")) in PLACEHOLDERS for turn in turns_of(row)
    ),
    "an empty turn has no tokens": lambda case, row: (
        case["name"] == "chat with eos train_on_inputs"
        and any(turn.get("content") == "" for turn in turns_of(row))
    ),
    "a null system text is none": lambda case, row: (
        case["name"] == "bradley_terry" and row["system"] is None
    ),
}


def turns_of(row):
    turns = row.get("messages") or row.get("conversations")
    return turns if isinstance(turns, list) else []


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """What workers are told of each of the small tokenizers."""
    found = {}
    for name, content in HEADER["tokenizers"].items():
        folder = tmp_path_factory.mktemp(name)
        for file, text in content.items():
            (folder / file).write_text(text, encoding="utf-8")
        source = {"name": "x", "type": "text", "path": "x"}
        config = PrepareConfig(output="x", tokenizer=str(folder), sources=[source])
        found[name] = read_spec(config)
    return found


def rows_of(case):
    name, _, part = case["rows"].partition(".")
    rows = HEADER["rows"][name]
    return [row[part] | {"system": row["system"]} for row in rows] if part else rows


def row_format(case, spec):
    settings = dict(case["config"]) | {"rl": case["rl"]}
    length = settings.pop("sequence_len", 512)
    config = AxolotlConfig.model_validate({"type": case["type"]} | settings | case["entry"])
    rules = token_rules(spec, length, config.train_on_inputs)
    config = config.model_copy(update={"min_sample_len": 1})
    return AxolotlFormat(build_strategy(config, rules), spec, config, length, seed=0)


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


def differences(case, spec):
    """The rows that differ."""
    triples = zip(rows_of(case), ours(case, spec), map(theirs, case["answers"]), strict=True)
    return [row for row, mine, answer in triples if not agree(mine, answer)]


def name_of(case):
    return f"{case['tokenizer']}: {case['name']}"


ANSWERED = [case for case in CASES if "answers" in case and not case["name"].startswith("stepwise")]


@pytest.mark.parametrize("case", ANSWERED, ids=name_of)
def test_ids_and_masks_are_axolotls(case, tokenizers):
    found = differences(case, tokenizers[case["tokenizer"]])
    unintended = [row for row in found if not any(why(case, row) for why in INTENDED.values())]
    assert unintended == []


@pytest.mark.parametrize("why", INTENDED)
def test_each_intended_difference_is_there(why, tokenizers):
    seen = [
        row
        for case in ANSWERED
        if any(INTENDED[why](case, row) for row in rows_of(case))
        for row in differences(case, tokenizers[case["tokenizer"]])
        if INTENDED[why](case, row)
    ]
    assert seen


@pytest.mark.parametrize("case", [case for case in CASES if "fails" in case], ids=name_of)
def test_options_that_axolotl_refuses_are_refused(case, tokenizers):
    with pytest.raises(ConfigError):
        row_format(case, tokenizers[case["tokenizer"]])


SOMETHING = (None, True, 0, -5, 1.5, "", "text", [], [0], {}, {"role": []}, [{"text": 1}])
KEYS = "role content value train weight tool_calls label rank detail reasoning_content".split()


def damaged(rng, value):
    """A value with parts of it missing, added, or of another type."""
    if rng.random() < 0.12:
        return rng.choice(SOMETHING)
    if isinstance(value, dict):
        kept = {key: damaged(rng, part) for key, part in value.items() if rng.random() > 0.05}
        return kept | ({rng.choice(KEYS): rng.choice(SOMETHING)} if rng.random() < 0.1 else {})
    return [damaged(rng, part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("case", [c for c in ANSWERED if c["tokenizer"] == "bos"], ids=name_of)
def test_rows_of_any_shape_are_used_or_refused_and_stop_nothing(case, tokenizers):
    rng = random.Random(case["name"])
    rows = [damaged(rng, dict(row)) for row in rows_of(case)[:30]]
    records = [
        Record(row, Place(__file__, 0, n)) for n, row in enumerate(rows) if type(row) is dict
    ]
    results = list(row_format(case, tokenizers["bos"]).encode(records))
    assert len(results) == len(records)
    assert {type(result) for result in results} <= {Encoded, Reject}


@pytest.mark.parametrize("name", REFUSED)
def test_types_that_shards_cannot_hold_are_refused_by_name(name, tokenizers):
    case = {"type": name, "config": {}, "entry": {}, "rl": None}
    with pytest.raises(ConfigError, match=f'axolotl type "{name}" .*; remove the source'):
        row_format(case, tokenizers["bos"])


def test_the_fixtures_are_of_the_version_that_the_docs_name():
    assert HEADER["versions"]["axolotl"] == "0.19.0"
    assert {case["tokenizer"] for case in CASES} == {"bos", "chatml", "llama"}
