"""Pairs of answers: every usual shape, the answers alone trained, each pair a row."""

import io
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from headrace.dataprep.shards.verify import verify
from headrace.jobs.console.inspection import inspect
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.schemas.toml_config import load_config

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
)
USER = {"role": "user", "content": "Which wheel?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("The water wheel.", "None."))
FIRST = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
SHAPES = {
    "prompt messages and answers": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "a prompt text and whole conversations": {
        "prompt": "Which wheel?",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
    },
    "messages and one message each": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": USER["content"]}],
        "chosen": {"from": "gpt", "value": GOOD["content"]},
        "rejected": {"from": "gpt", "value": BAD["content"]},
    },
    "messages and texts": {
        "messages": [USER],
        "chosen": GOOD["content"],
        "rejected": BAD["content"],
    },
    "JSON in strings": {
        "prompt": json.dumps([USER]),
        "chosen": json.dumps([GOOD]),
        "rejected": json.dumps([BAD]),
    },
}


def make_config(tokenizer_folder, rows, preference=None, template=TEMPLATE, **changes):
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "pairs", "type": "preference", "path": "pairs.jsonl"}
    if template:
        source["chat"] = {"template": template}
    if preference:
        source["preference"] = preference
    values = {
        "output": "out",
        "tokenizer": str(tokenizer_folder),
        "sequence_len": 256,
        "shards": 1,
        "evaluation_fraction": 0.0,
        "sources": [source],
    }
    return PrepareConfig.model_validate(values | changes)


def texts(tokenizer_folder, row):
    """Both sides of a row as text, each token that is not trained between angle quotes."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    found = []
    for side in ("", "rejected_"):
        ids, mask = row[f"{side}input_ids"], row[f"{side}loss_mask"]
        mask = [True] * len(ids) if mask is None else mask
        found.append(
            tuple(
                tokenizer.decode(
                    [token for token, mark in zip(ids, mask, strict=True) if mark == trained],
                    skip_special_tokens=False,
                )
                for trained in (False, True)
            )
        )
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_answers_are_trained_in_every_shape(shape, corpus, run, rows_of, tokenizer_folder):
    manifest = run(make_config(tokenizer_folder, [SHAPES[shape]]))
    (row,) = rows_of("out")
    prompt = "<user>Which wheel?<assistant>"
    assert texts(tokenizer_folder, row) == [
        (prompt, "The water wheel.</s>"),
        (prompt, "None.</s>"),
    ]
    assert manifest.kind == "preference"
    assert row["document_lengths"] == [len(row["input_ids"])]
    tokens = len(row["input_ids"]) + len(row["rejected_input_ids"])
    trained = sum(row["loss_mask"]) + sum(row["rejected_loss_mask"])
    (source,), (shard,) = manifest.sources, manifest.shards
    assert (source.documents, source.tokens, source.trained_tokens) == (1, tokens, trained)
    assert (shard.tokens, shard.trained_tokens) == (tokens, trained)
    assert manifest.ledger.tokens_in == tokens
    assert verify(Path("out")) == []


def test_pairs_of_texts_stand_between_the_ends_of_their_source(
    corpus, run, rows_of, bos_tokenizer_folder
):
    rows = [{"prompt": "a<s>b ", "chosen": "mill", "rejected": "gate</s>"}]
    config = make_config(bos_tokenizer_folder, rows, template=None, parse_special_tokens=True)
    cases = {
        "as they are": ({}, ("<s>a<s>b", " mill</s>"), ("<s>a<s>b", " gate</s>")),
        "text": (
            {"parse_special_tokens": False, "document_prefix": "", "add_prefix_space": True},
            (" a<s>b", " mill</s>"),
            (" a<s>b", " gate</s></s>"),
        ),
        "others": (
            {"document_prefix": [1, 1], "document_suffix": "<s>"},
            ("</s></s>a<s>b", " mill<s>"),
            ("</s></s>a<s>b", " gate</s><s>"),
        ),
    }
    for name, (options, *sides) in cases.items():
        source = config.sources[0].model_copy(update=options)
        run(config.model_copy(update={"output": name, "sources": [source]}))
        (row,) = rows_of(name)
        assert texts(bos_tokenizer_folder, row) == sides, name


def test_turns_that_both_sides_have_are_not_trained(corpus, run, rows_of, tokenizer_folder):
    row = {"chosen": [*FIRST, USER, GOOD], "rejected": [*FIRST, USER, BAD]}
    run(make_config(tokenizer_folder, [row]))
    (chosen, rejected) = texts(tokenizer_folder, rows_of("out")[0])
    assert (chosen[1], rejected[1]) == ("The water wheel.</s>", "None.</s>")
    assert "Good day." in chosen[0]


PLAIN = {"prompt": "stone mill\n", "chosen": "water wheel", "rejected": "timber"}


def test_plain_texts_are_one_text_with_bos_and_eos(corpus, run, rows_of, bos_tokenizer_folder):
    run(make_config(bos_tokenizer_folder, [PLAIN], template=None))
    assert texts(bos_tokenizer_folder, rows_of("out")[0]) == [
        ("<s>stone mill\n", "water wheel</s>"),
        ("<s>stone mill\n", "timber</s>"),
    ]


def test_plain_texts_can_be_taken_for_a_chat(corpus, run, rows_of, tokenizer_folder):
    fields = {"prompt": "question", "chosen": "good", "rejected": "bad", "as_chat": True}
    row = {"question": "Which?", "good": "This.", "bad": "That."}
    run(make_config(tokenizer_folder, [row], fields))
    assert texts(tokenizer_folder, rows_of("out")[0]) == [
        ("<user>Which?<assistant>", "This.</s>"),
        ("<user>Which?<assistant>", "That.</s>"),
    ]


LONG = {"prompt": "mill ", "chosen": "stone " * 60, "rejected": "wheel"}
LONG_PROMPT = {"prompt": "mill " * 60, "chosen": "stone", "rejected": "wheel"}


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_a_pair_with_a_side_that_is_too_long_is_truncated_or_dropped(
    overlong, corpus, run, rows_of, tokenizer_folder
):
    rows = [PLAIN, LONG, LONG_PROMPT]
    config = make_config(tokenizer_folder, rows, template=None, overlong=overlong, sequence_len=32)
    whole = run(make_config(tokenizer_folder, rows, template=None, output="whole"))
    manifest = run(config)
    lengths = sorted(
        (len(row["input_ids"]), len(row["rejected_input_ids"])) for row in rows_of("out")
    )
    dropped = manifest.sources[0].dropped_documents
    assert manifest.ledger.tokens_in == whole.ledger.tokens_in
    assert manifest.ledger.difference() == 0
    if overlong == "drop":
        assert len(lengths) == 1
        assert dropped == {"overlong document dropped": 2}
    else:  # of the long prompt nothing to train on would be left
        assert len(lengths) == 2
        assert max(lengths)[0] == 32
        assert dropped == {"overlong document dropped": 1}
        assert manifest.ledger.tokens_dropped["overlong document truncated"] > 0


REFUSED = {
    "no rejected": (
        {"prompt": "a", "chosen": "b"},
        'missing field: no field "rejected"; the record has "prompt", "chosen"',
    ),
    "no prompt": (
        {"chosen": [GOOD], "rejected": [BAD]},
        'missing field: no field "prompt"; the record has "chosen", "rejected"',
    ),
    "equal answers": (
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        "equal answers: chosen and rejected are the same",
    ),
    "a number": (
        {"prompt": "a", "chosen": 1, "rejected": "b"},
        "not a conversation: it is a number",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_is_no_pair_is_refused(name, corpus, run, tokenizer_folder):
    row, problem = REFUSED[name]
    rows = [SHAPES["whole conversations"], row]
    run(make_config(tokenizer_folder, rows, max_reject_fraction=1.0))
    (line,) = map(json.loads, Path("out/rejects/rejects.jsonl").read_text().splitlines())
    assert (line["line"], f"{line['reason']}: {line['detail']}") == (2, problem)


def test_two_workers_write_the_bytes_that_one_writes(corpus, run, snapshot, tokenizer_folder):
    rows = [
        {"prompt": f"{n} ", "chosen": "wheel " * (n % 7 + 1), "rejected": "stone"}
        for n in range(300)
    ]
    changes = {"template": None, "block_bytes": 1024, "shards": 3, "evaluation_fraction": 0.2}
    run(make_config(tokenizer_folder, rows, output="one", **changes), workers=1)
    run(make_config(tokenizer_folder, rows, output="two", **changes), workers=2)
    assert snapshot("one") == snapshot("two")
    assert read_manifest(Path("one")).split("evaluation")[0].rows > 20


def test_inspect_shows_both_sides(corpus, run, tokenizer_folder):
    run(make_config(tokenizer_folder, [SHAPES["whole conversations"]]))
    console = Console(file=io.StringIO(), width=200)
    inspect(Path("out"), 1, console)
    shown = console.file.getvalue()
    assert "┃chosen, " in shown
    assert "┃rejected, " in shown
    assert shown.index("The water wheel.") < shown.index("None.")


def test_verify_looks_at_the_rejected_side(corpus, run, tokenizer_folder):
    run(make_config(tokenizer_folder, [SHAPES["whole conversations"]]))
    from headrace.dataprep.shards.verify import check_rows

    rows = pq.read_table("out/shard-00000.parquet")
    manifest = read_manifest(Path("out"))
    assert list(check_rows(rows, manifest, -1)) == []
    index = rows.column_names.index("rejected_loss_mask")
    broken = rows.set_column(index, rows.field(index), [[[True]]])
    (problem,) = check_rows(broken, manifest, -1)
    assert re.fullmatch(
        "column rejected_loss_mask, row 0: rejected_loss_mask is not as long as "
        r"rejected_input_ids: 1, not \d+",
        problem,
    )


CONFIG = """
output = "out"
tokenizer = "tokenizer"
[[sources]]
name = "pairs"
type = "preference"
path = "pairs.jsonl"
"""
WRONG = {
    "a text among pairs": (
        CONFIG + '[[sources]]\nname = "more"\ntype = "text"\npath = "a.txt"\n',
        'source "more" gives causal rows, "pairs" preference ones; '
        "prepare each kind into a directory of its own",
    ),
    "packed pairs": (
        f'packing = "best_fit"\n{CONFIG}',
        'packing = "best_fit": a pair is a row of its own; remove it, or set "none"',
    ),
    "split pairs": (
        f'overlong = "split"\n{CONFIG}',
        'overlong = "split": preference rows cannot be split; set "truncate" or "drop"',
    ),
    "pairs for a text": (
        CONFIG.replace('"preference"', '"text"') + "[sources.preference]\n",
        'source "pairs": preference is for type = "preference"; remove it',
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_says_what_to_do(name, tmp_path):
    text, message = WRONG[name]
    path = tmp_path / "prepare.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(PrepareConfig, path)
    assert message in str(error.value)


def test_a_missing_template_is_named_before_the_work(corpus, run, tokenizer_folder):
    config = make_config(tokenizer_folder, [PLAIN], {"as_chat": True}, template=None)
    with pytest.raises(DataError, match=r"no chat template; set template in \[sources.chat\]$"):
        run(config)
    assert not Path("out").exists()
