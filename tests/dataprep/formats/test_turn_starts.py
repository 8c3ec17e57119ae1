"""Turns of the model begin where the generation prompt ends, in the less usual forms of templates.

Trained text stands between ⟦ and ⟧.
"""

import datetime
import json
import re
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from headrace.dataprep.formats.chat import ChatFormat
from headrace.dataprep.input.records import Place, Record
from headrace.dataprep.text.tokenizer_spec import read_spec
from headrace.schemas.prepare.chat_config import ChatConfig
from headrace.schemas.prepare.prepare_config import PrepareConfig

USER = {"role": "user", "content": "Q"}
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
NULL = CALLED | {"content": None}
RESULT = {"role": "tool", "content": "rain"}
SAID = {"role": "assistant", "content": "It rains."}
PROMPT = "{% if add_generation_prompt %}{{ '<|A|>' }}{% endif %}"
# the form of Llama 3: the first message brings BOS
BOS_IN_LOOP = (
    "{% for m in messages %}{% set text = '<|' + m.role[0]|upper + '|>' + m.content + '<|E|>' %}"
    "{{ '<s>' + text if loop.first else text }}{% endfor %}" + PROMPT
)
# of DeepSeek V3: an answer follows the end of a tool's results, and what calls there are does not
RESULTS_END = (
    "{% set ns = namespace(tool=false) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|U|>' + m.content }}{% elif m.role == 'tool' %}{{ '<|O|>' + m.content }}"
    "{% set ns.tool = true %}{% elif m.tool_calls %}{{ '<|A|><|C|>f<|E|>' }}"
    "{% set ns.tool = false %}{% else %}"
    "{{ ('<|END|>' if ns.tool else '<|A|>') + m.content + '<|E|>' }}{% set ns.tool = false %}"
    "{% endif %}{% endfor %}{% if ns.tool %}{{ '<|END|>' }}{% elif add_generation_prompt %}"
    "{{ '<|A|>' }}{% endif %}"
)
# of Mistral: no generation prompt, and a tool's result must follow a call
CHECKED = (
    "{% set ns = namespace(called=false) %}{% for m in messages %}"
    "{% if m.role == 'tool' and not ns.called %}{{ raise_exception('no call') }}{% endif %}"
    "{% set ns.called = m.tool_calls is defined %}{% if m.role == 'user' %}"
    "{{ '<|U|>' + m.content + '<|/U|>' }}{% elif m.role == 'tool' %}{{ '<|O|>' + m.content }}"
    '{% elif m.tool_calls %}{{ \'<|C|>[{"name": "\' + m.tool_calls[0].function.name }}'
    "{{ '\"}]<|E|>' }}"
    "{% else %}{{ m.content + '<|E|>' }}{% endif %}{% endfor %}"
)
# of Command A: the generation prompt is always written, and an opening follows it in a turn
ALWAYS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|U|>' + m.content + '<|E|>' }}"
    "{% else %}{{ '<|A|><|R|>' + m.content + '<|/R|><|E|>' }}{% endif %}{% endfor %}{{ '<|A|>' }}"
)
# of Nemotron 3: an answer without thinking leaves the generation prompt, here inside a word
THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|U|>' + m.content + '<|E|>' }}"
    "{% else %}{{ '<|A|>' + '<think></think>' + m.content + '<|E|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|A|><thought>\n' }}{% endif %}"
)
# of Metharme: nothing but the next role ends a turn
ENDLESS = (
    "{% for m in messages %}{{ '<|' + m.role[0]|upper + '|>' + m.content }}{% endfor %}" + PROMPT
)
# of DeepSeek R1: calls are written where a content is None
NULL_ASKED = (
    "{% for m in messages %}{% if m.role == 'assistant' and m['content'] is none %}"
    "{{ '<|A|><|C|>' + m.tool_calls[0].function.name + '<|E|>' }}"
    "{% else %}{{ '<|' + m.role[0]|upper + '|>' + m.content + '<|E|>' }}{% endif %}{% endfor %}"
    + PROMPT
)
# of LFM2: a content that is no text is written as JSON
NULL_WRITTEN = (
    "{% for m in messages %}{% set text = m.content %}{% if text is not string %}"
    "{% set text = text | tojson %}{% endif %}"
    "{{ '<|' + m.role[0]|upper + '|>' + text + '<|E|>' }}{% endfor %}" + PROMPT
)
CALLS_TWICE = [USER, CALLED, RESULT, CALLED, RESULT, SAID]
CASES = {
    "a first turn of the model": (BOS_IN_LOOP, [SAID, USER, SAID], (
        "<s><|A|>⟦It rains.<|E|>⟧<|U|>Q<|E|><|A|>⟦It rains.<|E|>⟧")),
    "nothing but a turn of the model": (BOS_IN_LOOP, [SAID], "<s><|A|>⟦It rains.<|E|>⟧"),
    "an answer behind the end of results": (RESULTS_END, [USER, CALLED, RESULT, SAID], (
        "<|U|>Q<|A|>⟦<|C|>f<|E|>⟧<|O|>rain<|END|>⟦It rains.<|E|>⟧")),
    "an answer behind results that calls follow too": (RESULTS_END, CALLS_TWICE, (
        "<|U|>Q<|A|>⟦<|C|>f<|E|>⟧<|O|>rain<|A|>⟦<|C|>f<|E|>⟧<|O|>rain<|END|>⟦It rains.<|E|>⟧")),
    "calls that are checked": (CHECKED, CALLS_TWICE, (
        '<|U|>Q<|/U|>⟦<|C|>[{"name": "f"}]<|E|>⟧<|O|>rain⟦<|C|>[{"name": "f"}]<|E|>⟧'
        "<|O|>rain⟦It rains.<|E|>⟧")),
    "a prompt that is always written": (ALWAYS, [USER, SAID, USER, SAID], (
        "<|U|>Q<|E|><|A|>⟦<|R|>It rains.<|/R|><|E|>⟧<|U|>Q<|E|><|A|>⟦<|R|>It rains.<|/R|><|E|>⟧"
        "<|A|>")),
    "thinking that is left out": (THINKING, [USER, SAID], (
        "<|U|>Q<|E|><|A|>⟦<think></think>It rains.<|E|>⟧")),
    "turns that only the next one ends": (ENDLESS, [USER, SAID, SAID], (
        "<|U|>Q<|A|>⟦It rains.⟧<|A|>⟦It rains.⟧")),
    "a content of None is asked for": (NULL_ASKED, [USER, NULL, RESULT, SAID], (
        "<|U|>Q<|E|><|A|>⟦<|C|>f<|E|>⟧<|T|>rain<|E|><|A|>⟦It rains.<|E|>⟧")),
    "a content of None is written": (NULL_WRITTEN, [USER, NULL, RESULT, SAID], (
        "<|U|>Q<|E|><|A|>⟦null<|E|>⟧<|T|>rain<|E|><|A|>⟦It rains.<|E|>⟧")),
}  # fmt: skip


def make_spec(folder, base, specials, eos):
    """A tokenizer with special tokens of some templates."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokens = [AddedToken(text, special=True, normalized=False) for text in sorted(specials)]
    tokenizer.add_special_tokens(tokens)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": eos, "bos_token": "<s>"})
    )
    source = {"name": "x", "type": "text", "path": "x"}
    return read_spec(PrepareConfig(output="x", tokenizer=str(folder), sources=[source]))


@pytest.fixture(scope="module")
def spec(tmp_path_factory, tokenizer_folder):
    texts = "".join(template for template, _, _ in CASES.values()) + "<|U|><|T|>"
    specials = {*re.findall(r"<\|/?[A-Z]+\|>", texts), "<s>"}
    return make_spec(tmp_path_factory.mktemp("turns") / "t", tokenizer_folder, specials, "<|E|>")


def encode(spec, template, messages):
    """The ids of a conversation and which are trained."""
    record = Record({"messages": messages}, Place("x", 0, 0))
    config = ChatConfig(template=template, date=datetime.date.today().isoformat())
    (found,) = ChatFormat(config, spec).encode([record])
    (sample,) = found.samples
    mask = [True] * len(sample.ids) if sample.trained is None else sample.trained.tolist()
    return sample.ids.tolist(), mask


@pytest.mark.parametrize("name", CASES)
def test_a_turn_is_trained_from_the_end_of_the_generation_prompt(name, spec):
    template, messages, right = CASES[name]
    tokenizer, shown = Tokenizer.from_file(spec.file), ""
    for trained, part in groupby(
        zip(*encode(spec, template, messages), strict=True), lambda p: p[1]
    ):
        text = tokenizer.decode([number for number, _ in part], skip_special_tokens=False)
        shown += f"⟦{text}⟧" if trained else text
    assert shown == right


TRL = find_spec("trl")  # looked for, not imported
PUBLISHED = Path(TRL.submodule_search_locations[0]) / "chat_templates" if TRL else Path("none")
NAMES = sorted(path.stem for path in PUBLISHED.glob("*.jinja"))
TOKENS = re.compile(r"<\|[^|>\s{}'\"]+\|?>|<[a-z_]+\|>|<\uff5c[^>]+>|</?s>|<(?:start|end)_of_turn>")
TABLE = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLS_TABLE = CALLED | {"tool_calls": [TABLE]}
UNCOMPARED = {  # they write contents as lists of parts, and thinking that no turn has
    "llava_next",
    "llava_next_training",
    "deepseekv3",
}
PUBLISHED_CHATS = [
    [USER, SAID],
    [{"role": "system", "content": "S"}, USER, SAID, USER, SAID],
    [USER, SAID | {"content": ""}, USER, SAID],
    [USER, CALLS_TABLE, RESULT, CALLS_TABLE, RESULT, SAID],
    [USER, SAID | {"content": "<think>\nHm.\n</think>\n\nYes."}],
]


@pytest.mark.exhaustive
@pytest.mark.skipif(not NAMES, reason="TRL is not installed")
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("diffusion")])
def test_published_templates_are_trained_from_their_generation_prompts(
    name, tmp_path, tokenizer_folder
):
    text = re.sub(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", "", (
        re.sub(r"\{#.*?#\}", "", (PUBLISHED / f"{name}.jinja").read_text("utf-8"), flags=re.S)
    ))  # fmt: skip
    specials = {*TOKENS.findall(text), "<|im_end|>", "<s>"}
    spec = make_spec(tmp_path / "t", tokenizer_folder, specials, "<|im_end|>")
    tokenizer, template = Tokenizer.from_file(spec.file), _compile_jinja_template(text)
    values = {"bos_token": "<s>", "eos_token": "<|im_end|>", "tools": None, "documents": None}
    compared = 0
    for messages in PUBLISHED_CHATS:
        try:
            whole = template.render(messages=messages, add_generation_prompt=False, **values)
        except Exception:  # noqa: BLE001  templates raise what they like
            continue
        ids, mask = encode(spec, text, messages)
        encoding = tokenizer.encode(whole, add_special_tokens=False)
        assert encoding.ids == ids
        starts = [
            place
            for place, on, before in zip(encoding.offsets, mask, [False, *mask], strict=False)
            if on and not before
        ]
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = template.render(messages=messages[:index], add_generation_prompt=True, **values)
            if whole.startswith(asked):
                compared += 1
                assert any(a <= len(asked) < b for a, b in starts), (messages, index)
    assert compared or name in UNCOMPARED
