"""Samples: with and without an adapter, by the chat template, and a whole file that goes on."""

import json
import shutil

import pytest
import torch
from saved_parts import adapter_of

from headrace.jobs import cli
from headrace.jobs.serve.chat_prompt import chat_prompt
from headrace.schemas.errors import ConfigError, DataError
from headrace.trainer.export.sample import Sampler, Sampling, as_messages
from headrace.trainer.export.sample_file import sample_file

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SHORT = Sampling(max_new_tokens=3)


def with_template(model, folder, template):
    """Return a directory with a model's tokenizer settings and a chat template."""
    for file in model.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def sampler(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "adapter"
    adapter = adapter_of(tiny_model, folder, std=1.0, target_modules="all-linear")
    made = Sampler(
        tiny_model, adapter, chat_prompt(with_template(tiny_model, folder.parent, TEMPLATE))
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small for more
    yield made
    torch.set_num_threads(threads)


@pytest.fixture
def questions(tmp_path):
    lines = [{"id": n, "prompt": "def " * (n + 1)} for n in range(5)]
    lines[3] = {"id": 3, "messages": as_messages("heap", "sorted")}
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_adapter_can_be_left_out(sampler, tiny_model):
    plain = Sampler(tiny_model, None).answer(["def push("], SHORT)
    assert sampler.answer(["def push("], SHORT, adapter=False) == plain
    assert sampler.answer(["def push("], SHORT) != plain


def test_a_padded_prompt_is_answered_as_it_is_alone(sampler):
    prompts = ["def", "import heapq  # a long one, so that the other is padded"]
    alone = [sampler.answer([prompt], SHORT)[0] for prompt in prompts]
    assert sampler.answer(prompts, SHORT) == alone


def test_messages_go_through_the_chat_template(sampler, tiny_model):
    ids = sampler.encode(as_messages("heap", "sorted"))
    assert sampler.tokenizer.decode(ids) == "[system] sorted [user] heap [assistant] "
    with pytest.raises(ConfigError, match="its tokenizer has no chat template"):
        chat_prompt(tiny_model)(as_messages("heap", None))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "2 s"),
        (
            "{% set n = namespace(t=['aaaa']) %}{% for i in range(64) %}"
            "{% set n.t = n.t + n.t %}{% endfor %}",
            "MiB of memory|too large",
        ),
        ("{{ raise_exception('no users') }}", r"refuses the conversation \(no users\)"),
        ("{{ messages.__class__ }}", "not allowed"),
    ],
    ids=["endless", "large", "refusing", "escaping"],
)
def test_a_chat_template_is_bounded_in_time_and_memory(tiny_model, tmp_path, template, message):
    render = chat_prompt(with_template(tiny_model, tmp_path, template))
    with pytest.raises(DataError, match=message) as caught:
        render(as_messages("heap", None))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("torn", ["", '{"id": 3, "pro'], ids=["between lines", "within a line"])
def test_a_file_goes_on_to_the_same_bytes(sampler, questions, tmp_path, torn):
    drawn = Sampling(max_new_tokens=3, temperature=1.0, seed=4)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert sample_file(sampler, questions, whole, drawn, compare=True, batch_size=2) == 5
    lines = whole.read_text().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == list(range(5))
    assert "response_without_adapter" in json.loads(lines[0])

    output.write_text("".join(lines[:3]) + torn)
    assert sample_file(sampler, questions, output, drawn, compare=True, batch_size=2) == 3
    assert output.read_bytes() == whole.read_bytes()
    assert sample_file(sampler, questions, output, drawn, compare=True, batch_size=2) == 0
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1}', 'record 1 has neither a text "prompt" nor "messages"'),
        ("{", r"questions\.jsonl:1: not JSON"),
        ("[1]", r"questions\.jsonl:1: not an object"),
    ],
)
def test_a_line_that_asks_nothing_is_named(sampler, tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        sample_file(sampler, path, tmp_path / "answers.jsonl", SHORT)


def test_an_output_of_another_input_is_not_continued(sampler, questions, tmp_path):
    output = tmp_path / "answers.jsonl"
    output.write_text('{"id": 0, "prompt": "other", "response": "a"}\n')
    with pytest.raises(ConfigError, match=r"answers\.jsonl:1: answers another input"):
        sample_file(sampler, questions, output, SHORT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "give either a PROMPT, or --input and --output"),
        (["model", "text", "--input", "a"], "give either a PROMPT, or --input and --output"),
        (["model", "text", "--compare"], "--compare needs an --adapter to leave out"),
    ],
)
def test_what_is_to_be_answered_must_be_said(arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["sample", *arguments])
