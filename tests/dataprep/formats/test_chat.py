"""Conversations: the template's text, the ids of transformers, and only wanted turns trained."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headrace.dataprep.formats.chat import ChatFormat
from headrace.dataprep.input.records import Place, Record
from headrace.dataprep.text.chat_mask import render_chat
from headrace.dataprep.text.chat_template import ChatTemplate
from headrace.dataprep.text.conversation import ConversationError, read_conversation
from headrace.dataprep.text.row_format import Encoded
from headrace.dataprep.text.tokenizer_spec import read_spec
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.chat_config import ChatConfig
from headrace.schemas.prepare.prepare_config import PrepareConfig

MODEL = Path(__file__).parents[3] / "models" / "smollm2-135m"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "trimming": CHATML.replace("message['content']", "message['content'] | trim"),
    "thinking": """
{%- for message in messages %}
    {%- if message.role == 'assistant' and not loop.last and '</think>' in message.content %}
        {{- '<|im_start|>assistant\n' + message.content.split('</think>')[-1].lstrip('\n') }}
    {%- elif message.role == 'assistant' and loop.last %}
        {{- '<|im_start|>assistant\n<think>\n' + message.reasoning_content | default('') }}
        {{- '\n</think>\n\n' + message.content | default('') }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content | default('') }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>' + call.function | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}""",
    "generation": """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}
        {{- message['content'] + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}""",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}" + CHATML,
    "plain": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}",
}
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=12) | st.sampled_from(
    ["", " ", "[1, 2]", "<|im_end|>", "assistant\n", "a</think>\n\nb", " stone mill ", "水車 🏞️"]
)
CHATS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The real tokenizer with another chat template: our specification and transformers'."""
    from transformers import AutoTokenizer

    found = {}

    def make(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("chat") / name
            folder.mkdir()
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(MODEL / file, folder)
            (folder / "chat_template.jinja").write_text(TEMPLATES[name])
            config = make_config(folder)
            found[name] = read_spec(config), AutoTokenizer.from_pretrained(folder)
        return found[name]

    return make


def make_config(folder, path="chats.jsonl", **chat):
    values = {
        "output": "out",
        "tokenizer": str(folder),
        "sequence_len": 4096,
        "packing": "none",
        "shards": 1,
        "evaluation_fraction": 0.0,
        "sources": [{"name": "talk", "type": "chat", "path": path, "chat": chat}],
    }
    return PrepareConfig.model_validate(values)


def encode(spec, row, **chat):
    """What the format makes of one row."""
    record = Record(row, Place("chats.jsonl", 0, 0))
    (result,) = ChatFormat(ChatConfig(**chat), spec).encode([record])
    return result


def trained_text(spec, row, **chat):
    """The trained tokens of a row as text, one string for each stretch."""
    encoded = encode(spec, row, **chat)
    assert isinstance(encoded, Encoded), encoded
    if not encoded.samples:
        return []
    (sample,) = encoded.samples
    tokenizer = Tokenizer.from_file(spec.file)
    mask = [True] * len(sample.ids) if sample.trained is None else sample.trained.tolist()
    groups = itertools.groupby(zip(mask, sample.ids.tolist(), strict=True), key=lambda x: x[0])
    return [
        tokenizer.decode([token for _, token in group], skip_special_tokens=False)
        for trained, group in groups
        if trained
    ]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(messages=CHATS)
def test_ids_are_those_of_transformers(name, messages, tokenizers):
    spec, theirs = tokenizers(name)
    expected = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    encoded = encode(spec, {"messages": messages}, train_on=["system", "user", "assistant"])
    found = [token for sample in encoded.samples for token in sample.ids.tolist()]
    assert found == expected or (not found and sum(encoded.dropped.values()) == len(expected))


@settings(deadline=None, max_examples=60)
@given(messages=CHATS)
def test_what_a_template_marks_as_generated_is_trained(messages, tokenizers):
    spec, theirs = tokenizers("generation")
    for message in messages:  # what transformers marks in an empty turn is its end alone
        message["content"] = "".join(c for c in message["content"] if c.isprintable()) or "stone"
    rendered = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    expected = [mark == 1 for mark in rendered["assistant_masks"]]
    encoded = encode(spec, {"messages": messages})
    if not any(expected):
        assert encoded.samples == []
        return
    (sample,) = encoded.samples
    found = [True] * len(sample.ids) if sample.trained is None else sample.trained.tolist()
    assert found == expected


@pytest.mark.parametrize("name", ["chatml", "trimming", "thinking", "plain"])
@settings(deadline=None, max_examples=60)
@given(messages=CHATS)
@example(messages=[{"role": "system", "content": "\n"}])
def test_each_turn_is_found_where_it_stands(name, messages):
    template = ChatTemplate(name, TEMPLATES[name], {})
    rendered = render_chat(template, messages)
    position = 0
    for message, turn in zip(messages, rendered.turns, strict=True):
        assert turn is not None
        span = (turn.start, turn.body_end)
        text = rendered.text[slice(*span)]
        text = text if name == "plain" else text.removesuffix("<|im_end|>")
        if name in ("chatml", "plain"):
            assert text == message["content"]
        elif name == "trimming":
            assert text == message["content"].strip()
        elif "</think>" not in message["content"]:
            assert text.endswith(message["content"])
        assert position <= span[0] <= max(span[1], span[0]) <= len(rendered.text)
        position = max(position, span[1])


CONVERSATION = [
    {"role": "system", "content": "You mill."},
    {"role": "user", "content": "Which wheel?"},
    {"role": "assistant", "content": "The [1, 2] water wheel."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Grind."},
]
SHAPES = {
    "messages": {"messages": CONVERSATION},
    "as JSON": {"messages": json.dumps(CONVERSATION)},
    "text parts": {
        "messages": [
            {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
            for m in CONVERSATION
        ]
    },
    "ShareGPT": {
        "conversations": [
            {
                "from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]),
                "value": m["content"],
            }
            for m in CONVERSATION
        ]
    },
    "ShareGPT with a system column": {
        "system": "You mill.",
        "conversations": [
            {"from": m["role"], "value": m["content"]} for m in CONVERSATION if m != CONVERSATION[0]
        ],
    },
    "one key a message": {"conversation": [{m["role"]: m["content"]} for m in CONVERSATION]},
    "padded by Arrow": {
        "messages": [{**m, "tool_calls": None, "weight": None} for m in CONVERSATION],
        "tools": None,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_assistant_turns_are_trained_with_their_end_in_every_shape(shape, tokenizers):
    spec, _ = tokenizers("chatml")
    assert trained_text(spec, SHAPES[shape]) == [
        "The [1, 2] water wheel.<|im_end|>",
        "Grind.<|im_end|>",
    ]
    assert encode(spec, SHAPES[shape]).content == encode(spec, SHAPES["messages"]).content


@pytest.mark.parametrize("lines", [True, False], ids=["jsonl", "json"])
def test_a_row_may_be_the_list_of_messages_itself(lines, corpus, run, rows_of, tokenizers):
    spec, theirs = tokenizers("chatml")
    rows = [[{m["role"]: m["content"] + str(n)} for m in CONVERSATION] for n in range(5)]
    path = "chats.jsonl" if lines else "chats.json"
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    Path(path).write_text(text)
    manifest = run(make_config(spec.folder, path))
    expected = [
        theirs.apply_chat_template(
            [{"role": m["role"], "content": m["content"] + str(n)} for m in CONVERSATION],
            return_dict=True,
        )["input_ids"]
        for n in range(5)
    ]
    found = rows_of("out")
    assert sorted(row["input_ids"] for row in found) == sorted(expected)
    trained = sum(sum(row["loss_mask"]) for row in found)
    assert manifest.sources[0].trained_tokens == trained == manifest.shards[0].trained_tokens
    assert 0 < trained < manifest.sources[0].tokens


OPTIONS = {
    "other roles": ({"train_on": ["user"]}, ["Which wheel?<|im_end|>", "And now?<|im_end|>"]),
    "no role": ({"train_on": []}, []),
    "another end": (
        {"end_of_turn": "<|im_end|>\n"},
        ["The [1, 2] water wheel.<|im_end|>\n", "Grind.<|im_end|>\n"],
    ),
    "an end that is not there": (
        {"end_of_turn": "<none>"},
        ["The [1, 2] water wheel.", "Grind."],
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_say_what_is_trained(name, tokenizers):
    options, expected = OPTIONS[name]
    assert trained_text(tokenizers("chatml")[0], {"messages": CONVERSATION}, **options) == expected


@pytest.mark.parametrize("flag", ["train", "weight"])
def test_a_message_may_say_itself_whether_it_is_trained(flag, tokenizers):
    spec, _ = tokenizers("chatml")
    messages = [dict(message) for message in CONVERSATION]
    messages[1][flag] = True if flag == "train" else 1
    messages[4][flag] = False if flag == "train" else 0
    expected = ["Which wheel?<|im_end|>", "The [1, 2] water wheel.<|im_end|>"]
    assert trained_text(spec, {"messages": messages}) == expected


def test_a_conversation_of_which_nothing_is_trained_is_dropped_by_name(tokenizers):
    encoded = encode(tokenizers("chatml")[0], {"messages": CONVERSATION[:2]})
    assert encoded.samples == []
    assert list(encoded.dropped) == ["nothing in it is trained"]


def test_reasoning_and_tool_calls_belong_to_the_turn(tokenizers):
    spec, theirs = tokenizers("thinking")
    call = {"type": "function", "function": {"name": "turn", "arguments": {"times": 2}}}
    messages = [
        {"role": "user", "content": "Turn it."},
        {"role": "assistant", "content": "Yes.", "tool_calls": [call]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "reasoning_content": "It turned.", "content": "Done."},
    ]
    written = '{"name": "turn", "arguments": {"times": 2}}'
    assert trained_text(spec, {"messages": messages}) == [
        f"Yes.\n<tool_call>{written}</tool_call><|im_end|>",
        "It turned.\n</think>\n\nDone.<|im_end|>",
    ]
    ids = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert encode(spec, {"messages": messages}).samples[0].ids.tolist() == ids
    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    for calls in ([call], call, json.dumps([call])):
        messages[1]["tool_calls"] = calls
        assert encode(spec, {"messages": messages}).samples[0].ids.tolist() == ids


def test_tools_reach_the_template(tokenizers):
    spec, theirs = tokenizers("tools")
    tools = [{"type": "function", "function": {"name": "turn", "parameters": {}}}]
    expected = theirs.apply_chat_template(CONVERSATION, tools=tools, return_dict=True)["input_ids"]
    for given_tools in (tools, json.dumps(tools)):
        encoded = encode(spec, {"messages": CONVERSATION, "tools": given_tools})
        assert encoded.samples[0].ids.tolist() == expected


REFUSED = {
    "no messages": ({"text": "a"}, "missing field: no field"),
    "no list": ({"messages": "hello"}, 'not a conversation: field "messages" is a string'),
    "an empty list": ({"messages": []}, 'not a conversation: field "messages" is an empty list'),
    "no role": (
        {"messages": [{"content": "a", "x": 1}]},
        'not a conversation: messages[0] has no "role"',
    ),
    "calls that are a text": (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": "f(1)"}]},
        "not a conversation: messages[0]: its tool_calls are a string, not objects",
    ),
    "no content": (
        {"messages": [{"role": "user"}]},
        'not a conversation: messages[0] has no "content"',
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        'content is not text: messages[0]: its content is of type "image"',
    ),
    "a number": (
        {"messages": [{"role": "user", "content": 5}]},
        "content is not text: messages[0]: its content is a number",
    ),
    "a strange weight": (
        {"messages": [{"role": "user", "content": "a", "weight": 0.5}]},
        'not a conversation: messages[0]: "weight" is neither 0 nor 1',
    ),
    "a noncharacter": (
        {"messages": [{"role": "user", "content": "a\ufdd2"}]},
        "reserved character: U+FDD2 is no text",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_is_no_conversation_is_refused(name, tokenizers):
    row, problem = REFUSED[name]
    reject = encode(tokenizers("chatml")[0], row)
    assert f"{reject.reason}: {reject.detail}".startswith(problem)


STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
)
ATTACKS = {
    "a class": "{{ messages.__class__ }}",
    "a subclass": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "a format string": "{{ '{0.__class__}'.format(messages) }}",
    "a change of the data": "{{ messages.append(1) }}",
    "a huge string": "{{ 'a' * 10 ** 9 }}",
    "a huge number": "{{ 2 ** (10 ** 9) }}",
}


def prepare_chats(run, spec, template, rows, **changes):
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(spec.folder, template=template)
    return run(config.model_copy(update=changes))


def test_a_template_that_raises_refuses_that_row_alone(corpus, run, rows_of, tokenizers):
    spec, theirs = tokenizers("chatml")
    rows = [
        {"messages": CONVERSATION[1:]},
        {"messages": CONVERSATION},
        {"messages": CONVERSATION[1:3]},
    ]
    prepare_chats(run, spec, STRICT, rows, max_reject_fraction=1.0)
    (line,) = Path("out/rejects/rejects.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "source": "talk",
        "file": "chats.jsonl",
        "line": 2,
        "reason": "refused by the chat template",
        "detail": "user first",
    }
    expected = [
        theirs.apply_chat_template(rows[i]["messages"], return_dict=True)["input_ids"]
        for i in (0, 2)
    ]
    assert sorted(row["input_ids"] for row in rows_of("out")) == sorted(expected)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_template_that_reaches_out_of_its_sandbox_stops_the_run(name, corpus, run, tokenizers):
    spec, _ = tokenizers("chatml")
    with pytest.raises(
        DataError, match=r"^chats\.jsonl:1: chat\.template: .*correct the chat template$"
    ):
        prepare_chats(run, spec, ATTACKS[name], [{"messages": CONVERSATION}])


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_template_without_end_stops_the_run_within_seconds(
    workers, corpus, run, tokenizers, monkeypatch
):
    spec, _ = tokenizers("chatml")
    if workers == 1:
        monkeypatch.setattr("headrace.dataprep.text.template_limits.SECONDS", 0.3)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for number in range(2):
        line = json.dumps({"messages": CONVERSATION * 3}) + "\n"  # a task of its own
        Path(f"{number}.jsonl").write_text(line)
    config = make_config(spec.folder, "?.jsonl", template=endless)
    with pytest.raises(
        DataError, match=r"^\d\.jsonl:1: chat\.template: one conversation took more"
    ):
        run(config.model_copy(update={"block_bytes": 1024}), workers)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", r"^chat\.template:1: .*; correct the chat template$"),
        ("{{ messages | random }}", r"^chat\.template:1: No filter named 'random'"),
        (
            "none.jinja",
            r'^source "talk": chat\.template = "none\.jinja" is neither Jinja text nor a ',
        ),
    ],
)
def test_a_template_that_is_none_is_found_before_the_work(
    template, message, corpus, run, tokenizers
):
    with pytest.raises(DataError, match=message):
        prepare_chats(run, tokenizers("chatml")[0], template, [{"messages": CONVERSATION}])
    assert not Path("out").exists()


def test_today_must_be_named(corpus, run, tokenizers):
    spec, _ = tokenizers("chatml")
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    with pytest.raises(DataError, match=r'asks for today.s date.*set date = "YYYY-MM-DD" in'):
        encode(spec, {"messages": CONVERSATION}, template=dated)
    encoded = encode(spec, {"messages": CONVERSATION}, template=dated, date="2026-11-21")
    text = Tokenizer.from_file(spec.file).decode(encoded.samples[0].ids.tolist())
    assert text.startswith("21 Nov 2026")
    with pytest.raises(DataError, match='date = "yesterday" is not a day'):
        encode(spec, {"messages": CONVERSATION}, template=dated, date="yesterday")


def test_templates_come_from_every_place_that_transformers_knows(tmp_path):
    """A name in a list of templates, files beside it, and the one for tools."""
    from transformers import AutoTokenizer

    named = [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": "T" + CHATML},
    ]
    layouts = {
        "config": {"tokenizer_config.json": {"chat_template": named[0]["template"]}},
        "list": {"tokenizer_config.json": {"chat_template": named}},
        "files": {
            "chat_template.jinja": CHATML,
            "additional_chat_templates/tool_use.jinja": "T" + CHATML,
        },
    }
    tools = [{"type": "function", "function": {"name": "turn"}}]
    for name, files in layouts.items():
        folder = tmp_path / name
        (folder / "additional_chat_templates").mkdir(parents=True)
        base = json.loads((MODEL / "tokenizer_config.json").read_text())
        shutil.copy(MODEL / "tokenizer.json", folder)
        (folder / "tokenizer_config.json").write_text(
            json.dumps(base | files.pop("tokenizer_config.json", {}))
        )
        for path, text in files.items():
            (folder / path).write_text(text)
        spec, theirs = read_spec(make_config(folder)), AutoTokenizer.from_pretrained(folder)
        for row in ({"messages": CONVERSATION}, {"messages": CONVERSATION, "tools": tools}):
            expected = theirs.apply_chat_template(
                CONVERSATION, tools=row.get("tools"), return_dict=True
            )["input_ids"]
            assert encode(spec, row).samples[0].ids.tolist() == expected


def test_another_template_is_other_work(corpus, run, tokenizers, rows_of):
    spec, _ = tokenizers("chatml")
    Path("t.jinja").write_text(CHATML)
    prepare_chats(run, spec, "t.jinja", [{"messages": CONVERSATION}])
    Path("t.jinja").write_text("!" + CHATML)
    with pytest.raises(DataError, match="out: finished with another config"):
        prepare_chats(run, spec, "t.jinja", [{"messages": CONVERSATION}])


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Which wheel?", "answer": "Grind."},
        {"question": [CONVERSATION[1]], "answer": [CONVERSATION[4]]},
    ],
    ids=["texts", "messages"],
)
def test_two_columns_are_a_conversation(row, tokenizers):
    spec, _ = tokenizers("chatml")
    names = {"prompt": "question", "completion": "answer"}
    assert trained_text(spec, row, **names) == ["Grind.<|im_end|>"]
    expected = {"messages": [CONVERSATION[1], CONVERSATION[4]]}
    assert encode(spec, row, **names).content == encode(spec, expected).content


def test_what_a_question_is_about_follows_it_on_a_line_of_its_own(tokenizers):
    spec, _ = tokenizers("chatml")
    names = {"prompt": "instruction", "prompt_input": "input", "completion": "output"}
    row = {"instruction": "Translate.", "input": "Mühle", "output": "Mill"}

    def asked(**changes):
        return encode(spec, row | changes, **names).content

    def expected(question):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "Mill"}]
        return encode(spec, {"messages": turns}).content

    assert asked() == expected("Translate.\nMühle")
    assert asked(input="") == asked(input=None) == expected("Translate.")
    assert asked(instruction="") == expected("Mühle")
    refused = encode(spec, row | {"input": 3}, **names)
    assert 'fields "instruction" and "input" are not texts' in refused.detail


LOST = {
    "tool calls": ({"content": "", "tool_calls": [{"function": {"name": "turn"}}]}, "tool_calls"),
    "reasoning": ({"content": "Yes.", "reasoning_content": "It turned."}, "reasoning_content"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_a_template_does_not_write_is_counted(name, tokenizers):
    message, lost = LOST[name]
    rows = {"messages": [CONVERSATION[1], {"role": "assistant", **message}]}
    notes = encode(tokenizers("chatml")[0], rows).notes
    assert notes[f"{lost} that the chat template does not write"] == 1


def test_turns_without_an_end_are_counted(tokenizers):
    notes = encode(tokenizers("plain")[0], {"messages": CONVERSATION}).notes
    assert notes["trained turns that end without a token that ends them"] == 2


def test_messages_may_be_an_object_of_lists():
    rows = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    columns = {"role": ["user", "assistant"], "content": ["Q", "A"]}
    read = [read_conversation({"messages": value}, ChatConfig()) for value in (rows, columns)]
    assert read[0] == read[1]
    with pytest.raises(ConversationError, match="is an object"):
        read_conversation({"messages": columns | {"content": ["Q"]}}, ChatConfig())
