"""A config is read once, and each mistake in one is a line that names file, line and remedy."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from headrace.schemas.config_errors import table_model
from headrace.schemas.config_model import Config
from headrace.schemas.errors import ConfigError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.prepare.source_config import SourceConfig
from headrace.schemas.toml_config import load_config, without_defaults
from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.schemas.train.layer_ranges import parse_layers
from headrace.schemas.train.train_config import TrainConfig

STRICT = Config.model_config
PREPARE = """\
output = "shards/a"
tokenizer = "models/a"

[[sources]]
name = "first"
type = "text"
path = "a/*.txt"

[[sources]]
name = "second"
type = "documents"
path = ["b.jsonl", "c.jsonl"]
"""

TRAIN = """\
model = "models/a"
output_dir = "runs/a"

[[datasets]]
path = "shards/a"

[[evaluation_datasets]]
path = "shards/a"

[adapter]
rank = 8

[optimizer]
lr = 1e-4
"""


def keys(model: type[Config]) -> str:
    return ", ".join(sorted(model.model_fields))


def read(model: type[Config], folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "config.toml"
    path.write_text(text)
    return load_config(model, path, overrides)


def message(model: type[Config], folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        read(model, folder, text, *overrides)
    return str(error.value).replace(f"{folder}/", "")


def test_a_config_with_only_its_required_keys_is_complete(tmp_path):
    prepare = read(PrepareConfig, tmp_path, PREPARE)
    train = read(TrainConfig, tmp_path, TRAIN)

    assert prepare.sequence_len == 1024
    assert prepare.sources[1].path == ["b.jsonl", "c.jsonl"]
    assert train.adapter.kind == "lora"
    assert train.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("packing", "overlong"), [("concatenate", None), ("best_fit", "split"), ("none", "split")]
)
def test_no_token_is_lost_unless_a_policy_asks_for_it(tmp_path, packing, overlong):
    prepare = read(PrepareConfig, tmp_path, PREPARE, f"packing={packing}")

    assert prepare.overlong == overlong
    assert PrepareConfig.model_validate_json(prepare.model_dump_json()) == prepare


CHAT = {"name": "talk", "type": "chat", "path": "a"}
TEXT = {"name": "text", "type": "text", "path": "b"}


def axolotl(kind):
    return {"name": "rows", "type": "axolotl", "path": "c", "axolotl": {"type": kind}}


@pytest.mark.parametrize(
    ("sources", "given", "packing", "policies"),
    [
        ([TEXT], {}, "concatenate", [None]),
        ([CHAT], {}, "best_fit", ["drop"]),
        ([CHAT], {"overlong": "truncate"}, "best_fit", ["truncate"]),
        ([CHAT], {"packing": "concatenate"}, "concatenate", [None]),
        ([CHAT], {"packing": "none"}, "none", ["drop"]),
        ([CHAT, TEXT], {}, "best_fit", ["drop", "split"]),
        ([axolotl("alpaca")], {}, "best_fit", ["drop"]),
        ([axolotl({"field_output": "out"})], {}, "best_fit", ["drop"]),
        ([axolotl("completion")], {}, "concatenate", [None]),
        ([axolotl("chat_template"), TEXT], {}, "best_fit", ["drop", "split"]),
    ],
)
def test_chats_are_not_cut_unless_the_config_says_so(sources, given, packing, policies):
    values = {"output": "a", "tokenizer": "b", "sources": sources, **given}
    config = PrepareConfig.model_validate(values)
    assert config.packing == packing
    assert [config.overlong_of(source) for source in config.sources] == policies
    assert PrepareConfig.model_validate_json(config.model_dump_json()) == config


# what is wrong, the text that is replaced, by what, the line that is shown
WRONG_PREPARE = [
    ("a misspelt key", "output =", "ouput =", [
        'config.toml:1: unknown key "ouput"; did you mean "output"?',
    ]),
    ("a key far from any other", 'output = "shards/a"', 'output = "shards/a"\nxyzzy = 1', [
        f'config.toml:2: unknown key "xyzzy"; known keys: {keys(PrepareConfig)}',
    ]),
    ("another trainer's name", 'output = "shards/a"', 'output = "shards/a"\nmax_seq_length = 8', [
        'config.toml:2: unknown key "max_seq_length"; did you mean "sequence_len"?',
    ]),
    ("a misspelt key in the second table", 'path = ["b', 'file = "x"\npath = ["b', [
        f'config.toml:12: unknown key "sources.1.file"; known keys: {keys(SourceConfig)}',
    ]),
    ("a key missing from the second table", 'path = ["b.jsonl", "c.jsonl"]\n', "", [
        'config.toml:9: required key "sources.1.path" is missing',
    ]),
    ("no table at all", PREPARE[PREPARE.index("[[") :], "", [
        'config.toml: required key "sources" is missing',
    ]),
    ("one table in place of a list", PREPARE[PREPARE.index("[[") :], "[sources]\nname = 'a'\n", [
        'config.toml:4: sources = {"name": "a"}: expected list of tables',
    ]),
    ("text for a number", 'output = "shards/a"', 'output = "shards/a"\nshards = "eight"', [
        'config.toml:2: shards = "eight": expected integer',
    ]),
    ("a fraction for an integer", 'output = "shards/a"', 'output = "shards/a"\nshards = 1.5', [
        "config.toml:2: shards = 1.5: expected integer",
    ]),
    ("true for an integer", 'output = "shards/a"', 'output = "shards/a"\nshards = true', [
        "config.toml:2: shards = true: expected integer",
    ]),
    ("a number below the least", 'output = "shards/a"', 'output = "shards/a"\nsequence_len = 4', [
        "config.toml:2: sequence_len = 4: must be greater than or equal to 8",
    ]),
    ("a word that is no choice", 'type = "documents"', 'type = "chatt"', [
        'config.toml:11: sources.1.type = "chatt": expected '
        '"text" or "documents" or "chat" or "preference" or "unpaired" or "pretokenized" '
        'or "axolotl"',
    ]),
    ("a number for a path", 'path = "a/*.txt"', "path = 3", [
        "config.toml:7: sources.0.path = 3: expected string or list of strings",
    ]),
    ("a number among paths", '"c.jsonl"]', "3]", [
        "config.toml:12: sources.1.path.1 = 3: expected string",
    ]),
    ("no path in the list", '["b.jsonl", "c.jsonl"]', "[]", [
        "config.toml:12: sources.1.path = []: must have at least 1 item after validation, not 0",
    ]),
    ("an empty path", '"shards/a"', '""', [
        'config.toml:1: output = "": must have at least 1 character',
    ]),
    ("two sources of one name", '"second"', '"first"', [
        'config.toml: two sources are named "first"; give each its own name',
    ]),
    ("a separator for documents", 'type = "documents"',
     'type = "documents"\ndocument_separator = "--"', [
        'config.toml: source "second": document_separator is for type = "text"; remove it',
    ]),
    ("a policy without its packing", 'output = "shards/a"',
     'output = "shards/a"\noverlong = "drop"', [
        'config.toml: overlong = "drop" has no meaning with packing = "concatenate", which cuts '
        "every document at row ends and loses nothing; remove it, or set packing to "
        '"best_fit" or "none"',
    ]),
    ("not TOML", 'output = "shards/a"', "output = shards", [
        "config.toml: not valid TOML: Invalid value (at line 1, column 10)",
    ]),
    ("the same key twice", 'output = "shards/a"', 'output = "a"\noutput = "b"', [
        "config.toml: not valid TOML: Cannot overwrite a value (at line 2, column 13)",
    ]),
]  # fmt: skip

WRONG_TRAIN = [
    ("another trainer's name in a table", "lr = 1e-4", "learning_rate = 1e-4", [
        'config.toml:14: unknown key "optimizer.learning_rate"; did you mean "optimizer.lr"?',
    ]),
    ("a key of another table", 'model = "models/a"', 'model = "models/a"\nlr = 1e-4', [
        'config.toml:2: unknown key "lr"; did you mean "optimizer.lr"?',
    ]),
    ("another trainer's name of another table", 'model = "models/a"',
     'model = "models/a"\nlora_r = 8', [
        'config.toml:2: unknown key "lora_r"; did you mean "adapter.rank"?',
    ]),
    ("a third trainer's name", 'model = "models/a"',
     'model = "models/a"\nlora_rank = 8', [
        'config.toml:2: unknown key "lora_rank"; did you mean "adapter.rank"?',
    ]),
    ("an unknown table", "[adapter]", "[adaptor]", [
        'config.toml:10: unknown key "adaptor"; did you mean "adapter"?',
    ]),
    ("a negative rank", "rank = 8", "rank = -8", [
        "config.toml:11: adapter.rank = -8: must be greater than or equal to 1",
    ]),
    ("a learning rate that is no number", "lr = 1e-4", "lr = nan", [
        "config.toml:14: optimizer.lr = NaN: must be a finite number",
    ]),
    ("a value for a table", 'model = "models/a"', 'model = "models/a"\nloader = 2', [
        "config.toml:2: loader = 2: expected table",
    ]),
    ("a table left out", "[optimizer]\nlr = 1e-4\n", "", [
        'config.toml: required key "optimizer" is missing',
    ]),
    ("an evaluation set without its path", 'path = "shards/a"\n\n[adapter]', "\n[adapter]", [
        'config.toml:7: required key "evaluation_datasets.0.path" is missing',
    ]),
    ("epochs and steps", 'model = "models/a"', 'model = "models/a"\nepochs = 2\nmax_steps = 5', [
        "config.toml: epochs = 2 and max_steps = 5 exclude each other; keep one",
    ]),
    ("a cosine that rises", "[optimizer]", "[scheduler]\nmin_lr = 1.0\n[optimizer]", [
        "config.toml: scheduler.min_lr = 1.0 is above optimizer.lr = 0.0001; lower it",
    ]),
    ("two evaluation sets of one name", "[adapter]",
     '[[evaluation_datasets]]\npath = "other/a"\n[adapter]', [
        'config.toml: two evaluation datasets are named "a"; give each its own `name`',
    ]),
    ("a wrong value below a string of many lines", 'model = "models/a"',
     'model = """\nrank = 1\n[adapter]\n"""\nmicro_batch_size = 0', [
        "config.toml:5: micro_batch_size = 0: must be greater than or equal to 1",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "valid", "old", "new", "lines"),
    [
        pytest.param(model, valid, old, new, lines, id=name)
        for model, valid, cases in (
            (PrepareConfig, PREPARE, WRONG_PREPARE),
            (TrainConfig, TRAIN, WRONG_TRAIN),
        )
        for name, old, new, lines in cases
    ],
)
def test_a_wrong_config_is_refused_with(tmp_path, model, valid, old, new, lines):
    assert valid.count(old) == 1
    assert message(model, tmp_path, valid.replace(old, new)).splitlines() == lines


def plain_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that holds no table, with dots, and its type."""
    for name, field in model.model_fields.items():
        table = table_model(field.annotation)
        if table is None:
            yield prefix + name, Annotated[field.annotation, *field.metadata, field]
        else:
            yield from plain_fields(table, f"{prefix}{name}.")


@pytest.mark.parametrize("model", [PrepareConfig, TrainConfig])
def test_true_is_a_number_for_no_key(model):
    takes_true = re.compile(r"bool|Literal\[True\]")
    types = {name: k for name, k in plain_fields(model) if not takes_true.search(str(k))}
    assert len(types) > 40
    for name, kind in types.items():
        with pytest.raises(ValidationError, match="validation error"):
            pytest.fail(f"{name}: {TypeAdapter(kind, config=STRICT).validate_python(True)}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=3e-5", {"optimizer": {"lr": 3e-5}}),
        ("optimizer.lr=1", {"optimizer": {"lr": 1.0}}),
        ("max_steps = 7", {"max_steps": 7}),
        ("model=models/b", {"model": "models/b"}),
        ('model="models/b"', {"model": "models/b"}),
        ("loader.shuffle=false", {"loader": {"shuffle": False}}),
        ('adapter.target_modules=["q_proj"]', {"adapter": {"target_modules": ["q_proj"]}}),
        ("datasets.0.path=shards/b", {"datasets": [{"path": "shards/b"}]}),
    ],
)
def test_set_overrides_one_key(tmp_path, override, expected):
    config = read(TrainConfig, tmp_path, TRAIN, override).model_dump(exclude_unset=True)

    for key, value in expected.items():
        found = config[key]
        assert {k: found[k] for k in value} == value if isinstance(value, dict) else found == value


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("lr", '--set lr: write it as key=value, as in "optimizer.lr=1e-4"'),
        ("=3", '--set =3: write it as key=value, as in "optimizer.lr=1e-4"'),
        ("model.size=3", "--set model.size=3: model is not a table"),
        (
            "optimizer.learning_rate=3",
            '--set optimizer.learning_rate=3: unknown key "optimizer.learning_rate"; '
            'did you mean "optimizer.lr"?',
        ),
        ("lr=3", '--set lr=3: unknown key "lr"; did you mean "optimizer.lr"?'),
        ("optimizr.lr=3", '--set optimizr.lr=3: unknown key "optimizr"; did you mean "optimizer"?'),
        ("seed=abc", '--set seed=abc: seed = "abc": expected integer'),
        (
            "adapter.rank=0",
            "--set adapter.rank=0: adapter.rank = 0: must be greater than or equal to 1",
        ),
        (
            "datasets.1.path=a",
            "--set datasets.1.path=a: datasets is a list of 1; "
            "name one by its number from 0, as in datasets.0",
        ),
        (
            "datasets.path=a",
            "--set datasets.path=a: datasets is a list of 1; "
            "name one by its number from 0, as in datasets.0",
        ),
    ],
)
def test_a_wrong_override_is_named_as_it_was_typed(tmp_path, override, line):
    assert message(TrainConfig, tmp_path, TRAIN, override) == line


def test_the_last_override_of_a_key_wins(tmp_path):
    assert read(TrainConfig, tmp_path, TRAIN, "seed=1", "seed=2").seed == 2


def test_every_mistake_is_shown_at_once(tmp_path):
    text = TRAIN.replace("rank = 8", "rank = 0").replace("lr = 1e-4", "lr = 0")

    assert message(TrainConfig, tmp_path, text).splitlines() == [
        "config.toml:11: adapter.rank = 0: must be greater than or equal to 1",
        "config.toml:14: optimizer.lr = 0: must be greater than 0",
    ]


def test_a_config_that_is_not_there_or_not_text_is_named(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")

    with pytest.raises(ConfigError, match=r"none\.toml: not found; give the path of a TOML config"):
        load_config(TrainConfig, tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"binary\.toml: cannot be read"):
        load_config(TrainConfig, tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(TrainConfig, tmp_path)


def test_dotted_and_inline_keys_have_their_own_lines(tmp_path):
    text = TRAIN.replace("[adapter]\nrank = 8\n\n[optimizer]\nlr = 1e-4\n", "")
    inline = "adapter.rank = 0\noptimizer = { lr = 0.1, eps = 0 }\n"

    assert message(TrainConfig, tmp_path, inline + text).splitlines() == [
        "config.toml:1: adapter.rank = 0: must be greater than or equal to 1",
        "config.toml:2: optimizer.eps = 0: must be greater than 0",
    ]


def test_the_fingerprint_depends_on_values_and_not_on_how_they_are_written(tmp_path):
    plain = read(PrepareConfig, tmp_path, PREPARE)
    default_written_out = read(PrepareConfig, tmp_path, "seed = 0  # zero\n" + PREPARE)
    other = read(PrepareConfig, tmp_path, PREPARE, "seed=1")

    prints = [
        fingerprint(config.model_dump(mode="json"))
        for config in (plain, default_written_out, other)
    ]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("3", [3]), ("0:2", [0, 1, 2]), ("0:2, 7,5:6", [0, 1, 2, 5, 6, 7]), ("1,1:2", [1, 2])],
)
def test_layer_lists_hold_single_layers_and_ranges_whose_ends_count(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3:", ":3", "5:2", "1-3", "-1", "1:2:3"])
def test_what_is_no_layer_list_is_named(text):
    with pytest.raises(ValueError, match=re.escape(f'"{text}"')):
        parse_layers(text)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"init": "pissa", "kind": "dora"}, 'init = "pissa" does not go with kind = "dora"'),
        ({"target_parameters": "experts", "dropout": 0.1}, "dropout = 0.1 does not go with"),
        ({"kind": "none", "modules_to_save": ["norm"]}, "modules_to_save has no meaning"),
        ({"kind": "blocks", "layers": "0:3"}, "layers has no meaning"),
        ({"layers": "3:1"}, '"3:1": the range 3:1 ends before it starts'),
    ],
)
def test_adapter_settings_that_exclude_each_other_are_named(adapter, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AdapterConfig.model_validate(adapter)


@pytest.mark.parametrize(
    "text",
    [
        TRAIN,
        TRAIN.replace("lr = 1e-4", 'lr = 1e-4\ntype = "adam"'),
        TRAIN + '[objective]\nkind = "focal"\ngamma = 2.0\n',
        TRAIN + "[regularization]\nneftune_alpha = 5.0\n",
    ],
)
def test_a_recorded_config_reads_as_what_it_was(tmp_path, text):
    config = read(TrainConfig, tmp_path, text)
    recorded = config.model_dump(mode="json")
    again = TrainConfig.model_validate(without_defaults(TrainConfig, recorded))
    assert again.model_dump(mode="json") == recorded
    assert without_defaults(TrainConfig, recorded | {"strange": 1})["strange"] == 1


@pytest.mark.parametrize("key", ["neighbors", "neighbours"])
def test_a_key_is_also_read_in_its_earlier_spelling(tmp_path, key):
    config = read(TrainConfig, tmp_path, f'{key} = "replicas"\n{TRAIN}')
    assert config.model_dump()["neighbors"] == "replicas"


@pytest.mark.parametrize("kind", ["adamw", "adam", "lion"])
def test_restarts_need_an_optimizer_whose_states_can_be_pruned(tmp_path, kind):
    text = TRAIN.replace("lr = 1e-4", 'lr = 1e-4\ntype = "TYPE"') + "[relora]\nevery_steps = 20\n"
    assert read(TrainConfig, tmp_path, text.replace("TYPE", kind))
    said = message(TrainConfig, tmp_path, text.replace("TYPE", "adafactor"))
    assert "cannot be pruned; choose one of adamw, adam, lion" in said


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path):
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbf" + TRAIN.encode())
    assert load_config(TrainConfig, path) == read(TrainConfig, tmp_path, TRAIN)
