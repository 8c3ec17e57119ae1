"""Chat templates in the form of current models': the same masks with and without their marks.

`chat_templates.json` holds a template for each, in own words, with `{% generation %}` around what
the model writes after the generation prompt. Without these marks the mask must come out the same.
"""

import json
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from headrace.dataprep.formats.chat import ChatFormat
from headrace.dataprep.formats.turn_mask import NO_END
from headrace.dataprep.input.records import Place, Record
from headrace.dataprep.text.chat_mask import render_chat
from headrace.dataprep.text.chat_template import ChatTemplate
from headrace.dataprep.text.template_limits import MEGABYTES
from headrace.dataprep.text.tokenizer_spec import read_spec
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.chat_config import ChatConfig
from headrace.schemas.prepare.prepare_config import PrepareConfig

TEMPLATES = json.loads(Path(__file__).with_name("chat_templates.json").read_text("utf-8"))
SPECIAL = re.compile(
    r"<\|[^|>]+\|?>|<[a-z_]+\|>|</?s>|<(?:start|end)_of_turn>|\[[/A-Z_|a-z]+\]|\[e~\["
)
USER = {"role": "user", "content": "Q"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
SAID = {"role": "assistant", "content": "It rains."}
CHATS = {
    "one turn": [USER, SAID],
    "several turns": [{"role": "system", "content": "S"}, USER, SAID, USER, SAID],
    "a tool": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call00001", "content": "rain"},
        SAID,
    ],
    "thinking": [
        USER,
        SAID | {"reasoning_content": "Hm."},
        USER,
        SAID | {"reasoning_content": "R"},
    ],
    "an empty turn": [USER, SAID | {"content": ""}, USER, SAID | {"content": ""}],
    "texts like the template's": [
        USER | {"content": "assistant\n"},
        SAID | {"content": "assistant"},
    ],
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory, tokenizer_folder):
    """A tokenizer with the special tokens of all the templates."""
    folder = tmp_path_factory.mktemp("templates")
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    found = sorted({t for text in TEMPLATES.values() for t in SPECIAL.findall(text)})
    roles = [f"<|{pre}{role}|>" for pre in ("", "im_") for role in ("user", "system", "tool")]
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in [*found, *roles]]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    stops = [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>", "</s>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    source = {"name": "x", "type": "text", "path": "x"}
    return read_spec(PrepareConfig(output="x", tokenizer=str(folder), sources=[source]))


def encode(spec, template, messages):
    """The ids and the mask of a conversation, and what was noted."""
    record = Record({"messages": messages}, Place("x", 0, 0))
    (found,) = ChatFormat(ChatConfig(template=template), spec).encode([record])
    (sample,) = found.samples
    mask = [True] * len(sample.ids) if sample.trained is None else sample.trained.tolist()
    return sample.ids.tolist(), mask, found.notes


def unmarked(template):
    return re.sub(r"\{%- (end)?generation %\}", "", template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_the_templates_own_marks(name, spec):
    for chat, messages in CHATS.items():
        expected = encode(spec, TEMPLATES[name], messages)
        found = encode(spec, unmarked(TEMPLATES[name]), messages)
        tokenizer = Tokenizer.from_file(spec.file)
        shown = [
            tokenizer.decode([i for i, on in zip(*one[:2], strict=True) if on], False)
            for one in (found, expected)
        ]
        assert shown[0] == shown[1], chat
        assert found[:2] == expected[:2], chat
        assert not found[2].get(NO_END), chat


def test_long_tool_conversations_take_renderings_by_their_length(monkeypatch):
    template = ChatTemplate("qwen3", unmarked(TEMPLATES["qwen3"]), {})
    render = template.render
    rendered = []

    def counted(messages, tools=None, ask=False):
        rendered.append(len(messages))
        return render(messages, tools, ask)

    monkeypatch.setattr(template, "render", counted)

    def messages_rendered(calls):
        messages = [USER]
        for number in range(calls):
            call = {**CALL, "function": {"name": "f", "arguments": {"a": number}}}
            messages += [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "data " * 50},
            ]
        rendered.clear()
        render_chat(template, messages, None, range(1, 2 * calls, 2))
        return sum(rendered)

    assert messages_rendered(300) <= 30 * messages_rendered(10)


BOMBS = {
    "folded constants": "{{ [1]|slice(30000000)|list|length }}",
    "a width": "{{ ('%9999999999d' % 1)|length }}",
    "a width of format": "{{ '{:>9999999999}'.format(1)|length }}",
    "a filter": "{{ '%9999999999d'|format(1)|length }}",
    "doubling": "{% set ns=namespace(s='a'*8000000) %}{% for i in range(10) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s|length }}",
    "padding": "{{ 'a'.ljust(40000000000)|length }}",
    "centering": "{{ 'a'|center(40000000000)|length }}",
    "an indent": "{{ [[1]]|tojson(indent=9999999999) }}",
    "nesting": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


# hypothesis watches garbage collections in a callback, in which the end of the time may be lost
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_takes_too_much_is_refused_in_one_line(name):
    before = peak_kilobytes()
    with pytest.raises(DataError, match=r"^t: .*correct the chat\s+template") as refused:
        ChatTemplate("t", BOMBS[name], {}).render([USER])
    assert "\n" not in str(refused.value)
    assert peak_kilobytes() - before < (MEGABYTES + 64) << 10


def peak_kilobytes():
    """The most address space that this process has had: what it reserved before does not count."""
    (line,) = re.findall(r"VmPeak:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line)
