"""Prompts that are answered at evaluations: by transformers' own tokens, in every layout, told."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_families import config_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.jobs.report.page import write_report
from headrace.trainer.metrics.answers_log import AnswersLog, PromptedAnswer, as_markdown
from headrace.trainer.metrics.loss_changes import LossChanges
from headrace.trainer.pipeline.prompted_answers import asked_by_row
from headrace.trainer.shards.decoded_rows import Row

PROMPT = "import json & <os>\n"


def row(mask, documents):
    ids = np.arange(len(mask), dtype=np.int32)
    return Row(ids, np.array(mask, bool), np.array(documents, np.int32), "a", 0)


def test_a_row_asks_what_stands_before_its_first_trained_token():
    assert asked_by_row(row([0, 0, 1, 1, 0, 1], [4, 2])) == ([0, 1], [2, 3])
    assert asked_by_row(row([1, 1, 0, 1], [2, 2])) is None
    assert asked_by_row(row([0, 0, 0, 1], [2, 2])) is None


def test_answers_after_a_resume_point_are_taken_back(tmp_path):
    log = AnswersLog(tmp_path, -1, "")
    for step in (0, 5, 10):
        log.write(step, [PromptedAnswer("a", f"b{step}", 1, ended=True)])
    with log.path.open("a") as file:
        file.write('{"step": 3, "cut')
    AnswersLog(tmp_path, 5, "")
    kept = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["answer"] for line in kept] == ["b0", "b5"]


def test_nothing_in_an_answer_counts_as_markup():
    table = as_markdown([PromptedAnswer("a|b\n", "<script>*`", 1, ended=True)])
    assert table.splitlines()[-1] == "| a&#124;b<br> | &lt;script&gt;&#42;&#96; |  |"


def test_changes_of_a_loss_are_percents_of_the_first_and_the_last():
    changes = LossChanges()
    assert changes.note("a", 4.0) == {}
    changes.note("a", 3.0)
    found = changes.note("a", 1.5)
    assert found == {"change_from_first_percent": -62.5, "change_percent": -50.0}
    assert changes.note("b", 1.0) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluation": {"temperature": 1.0}}, "temperature has no meaning without"),
        ({"evaluation": {"prompt_rows": 2}}, "whose rows it takes"),
        ({"evaluation": {"prompts": ["a"]}, "objective": {"kind": "reward"}}, "writes no text"),
        ({"evaluation": {"prompts": ["a"]}, "sequence_parallel": 2}, "which cuts rows"),
    ],
)
def test_what_cannot_be_answered_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        config_of("unused", **settings)


@pytest.mark.slow
def test_answers_are_those_of_transformers_and_reach_files_board_and_page(
    pair_training, tiny_model
):
    settings = {
        "evaluation__prompts": [PROMPT],
        "evaluation__prompt_rows": 2,
        "evaluation__max_new_tokens": 8,
        "max_steps": 2,
        "optimizer__lr": 1e-2,
    }
    one = pair_training.run("one", 1, **settings)
    two = pair_training.run("two", 2, **settings, pipeline_stages=2)
    text = (one / "answers.jsonl").read_text()
    assert text == (two / "answers.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 0, 2, 2, 2]
    assert [line["expected"] is None for line in lines] == [True, False, False] * 2
    assert lines[3]["prompt"] == PROMPT

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, one / "adapter").eval()
    for line in lines[3:]:
        ids = tokenizer(line["prompt"], return_tensors="pt").input_ids
        found = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        new = found[0, ids.shape[1] :].tolist()
        assert tokenizer.decode(new, skip_special_tokens=True) == line["answer"]
        assert len(new) == line["tokens"]

    board = EventAccumulator(str(one / "tensorboard"))
    board.Reload()
    assert "evaluation/answers/text_summary" in board.Tags()["tensors"]
    assert "evaluation/shards/change_from_first_percent" in board.Tags()["scalars"]
    page = write_report(one).read_text()
    assert "Answers after step 2" in page
    assert "import json &amp; &lt;os&gt;" in page
