"""Text from outside ends in values or in one line, whatever it holds."""

import time

import pytest

from headrace.schemas.errors import ConfigError
from headrace.schemas.outside_text import (
    MOST_NESTED,
    OutsideTextError,
    parse_json,
    parse_toml,
    parse_yaml,
    read_text,
)
from headrace.schemas.prepare.axolotl_yaml import AxolotlFile
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.toml_config import load_config

DIGITS = "1" * 5000
DEEP = MOST_NESTED + 2
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "m0: &m0 {k0: 1}\n" + "".join(
    f"m{n}: &m{n}\n  <<: [*m{n - 1}, *m{n - 1}]\n  k{n}: 1\n" for n in range(1, 26)
)
CHAIN = "c0: &c0 [x]\n" + "".join(f"c{n}: &c{n} [*c{n - 1}]\n" for n in range(1, 200))

REFUSED = {
    "broken JSON": (parse_json, "{", "not valid JSON"),
    "deep JSON": (parse_json, "[" * DEEP + "]" * DEEP, "nested more than 100 deep"),
    "very deep JSON": (parse_json, "[" * 100_000, "not valid JSON"),
    "a long number in JSON": (parse_json, DIGITS, "not valid JSON"),
    "half a pair in JSON": (parse_json, r'{"a": "\ud800"}', "half a surrogate pair"),
    "bytes that are no UTF-8": (parse_json, b'"\xff"', "not valid JSON"),
    "deep TOML": (parse_toml, "a = " + "[" * 5000, "not valid TOML"),
    "a long number in TOML": (parse_toml, f"a = {DIGITS}", "not valid TOML"),
    "a large number in TOML": (parse_toml, f"a = {10**30}", "beyond 64 bits"),
    "a bad date in TOML": (parse_toml, "a = 2024-13-45", "not valid TOML"),
    "deep YAML": (parse_yaml, "[" * DEEP + "]" * DEEP, "nested more than 100 deep"),
    "aliases that multiply": (parse_yaml, ALIASES, "aliases stand for more than"),
    "merge keys that multiply": (parse_yaml, MERGES, "aliases stand for more than"),
    "a chain of aliases": (parse_yaml, CHAIN, "nested more than 100 deep"),
    "an alias of itself": (parse_yaml, "a: &a {b: *a}", "stands for what holds it"),
    "a bad date in YAML": (parse_yaml, "a: 2024-13-45", "not valid YAML"),
    "a date that is none": (parse_yaml, "a: !!timestamp x", "not valid YAML"),
    "a truth value that is none": (parse_yaml, "a: !!bool x", "not valid YAML"),
    "a number of no digits": (parse_yaml, "a: !!int ''", "not valid YAML"),
    "a long number in YAML": (parse_yaml, f"a: {DIGITS}", "not valid YAML"),
    "a control character in YAML": (parse_yaml, "a: \x01", "not valid YAML"),
    "half a pair in YAML": (parse_yaml, r'a: "\ud800"', "half a surrogate pair"),
    "an object of Python": (parse_yaml, "a: !!python/object:os.system {}", "not valid YAML"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_in_one_line(name):
    parse, text, problem = REFUSED[name]
    start = time.process_time()
    with pytest.raises(OutsideTextError, match=problem) as refused:
        parse(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300
    assert time.process_time() - start < 5


def test_sound_text_is_read_with_its_lines():
    values, tree = parse_yaml("a: &a {b: 1}\nc:\n  <<: *a\n  d: 2\n")
    assert values == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}
    assert tree.value[1][0].start_mark.line == 1
    assert parse_json(f'{{"model_max_length": {10**30}}}') == {"model_max_length": 10**30}


def test_a_byte_order_mark_is_left_out_and_size_and_kind_are_checked(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert parse_toml(read_text(path)) == {"a": 1}
    with pytest.raises(OutsideTextError, match="has more than 4 bytes"):
        read_text(path, 4)
    path.write_bytes(b"a = 1\nb = '\xff'\n")
    with pytest.raises(OutsideTextError, match="byte 0xff is no UTF-8") as refused:
        read_text(path)
    assert refused.value.line == 2
    with pytest.raises((OutsideTextError, OSError)):
        read_text(tmp_path)


def test_an_axolotl_file_names_the_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("datasets: []\nseed: &s [*s]\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:2: an alias stands for what holds it"):
        AxolotlFile(str(path))


@pytest.mark.parametrize("value", [r'"a\u0000b"', DIGITS, "[" * 5000, "2024-13-45"])
def test_a_config_with_a_value_that_cannot_be_is_one_line(tmp_path, value):
    path = tmp_path / "prepare.toml"
    path.write_text(f'output = {value}\ntokenizer = "t"\n')
    with pytest.raises(ConfigError) as refused:
        load_config(PrepareConfig, path)
    assert str(refused.value).startswith(str(path))
    with pytest.raises(ConfigError):
        load_config(PrepareConfig, path, [f"seed={value}"])
