"""Axolotl's YAML files and its types as sources of `headrace prepare`."""

import gzip
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from headrace.dataprep.prepare import prepare
from headrace.dataprep.shards.verify import verify
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.toml_config import load_config

with gzip.open(Path(__file__).with_name("golden.jsonl.gz"), "rt", encoding="utf-8") as lines:
    TOKENIZERS = json.loads(next(lines))["tokenizers"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with a tokenizer, 30 instruction rows and 20 conversations."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    for name, text in TOKENIZERS["bos"].items():
        Path("model", name).write_text(text, encoding="utf-8")
    write_rows(
        "alpaca.jsonl",
        (
            {"instruction": f"do {n}", "input": "x" * (n % 2), "output": f"done {n}"}
            for n in range(30)
        ),
    )
    turns = [("human", "hi {}"), ("gpt", "hello {}")]
    write_rows(
        "chats/train.jsonl",
        (
            {"conversations": [{"from": who, "value": text.format(n)} for who, text in turns]}
            for n in range(20)
        ),
    )
    return tmp_path


def write_rows(path, rows):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def from_yaml(text, output="out", **changes):
    Path("axolotl.yml").write_text(text)
    return make([{"name": "mine", "type": "axolotl", "path": "axolotl.yml"}], output, **changes)


def from_options(options, path="alpaca.jsonl", **changes):
    source = {"name": "mine", "type": "axolotl", "path": path, "axolotl": options}
    return make([source], **(DIRECT | changes))


DIRECT = {"sequence_len": 256, "packing": "none", "evaluation_fraction": 0}


def make(sources, output="out", **changes):
    values = {"output": output, "tokenizer": "model", "shards": 1, "block_bytes": 1024}
    return PrepareConfig.model_validate(values | changes | {"sources": sources})


def run(config, workers=1):
    return prepare(config, workers)


def texts(split="shard", output="out", column="input_ids"):
    """Documents as text with the trained part in guillemets, sorted."""
    tokenizer = Tokenizer.from_file("model/tokenizer.json")
    found = []
    for path in sorted(Path(output).glob(f"{split}-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            mask = row["loss_mask"] or [True] * len(row["input_ids"])
            start = 0
            for length in row["document_lengths"]:
                ids = row[column][start : start + length]
                first = [*mask[start : start + length], True].index(True)
                parts = (ids[:first], ids[first:])
                head, tail = (tokenizer.decode(part, skip_special_tokens=False) for part in parts)
                found.append(f"{head}«{tail}»")
                start += length
    return sorted(found)


SEVERAL = """
base_model: not/read
learning_rate: 0.0002
sequence_len: 64
sample_packing: true
chat_template: chatml
eot_tokens: ["<|im_end|>"]
datasets:
  - path: alpaca.jsonl
    type: alpaca_chat.load_no_prompt
  - path: chats
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    split: train[5:8]
  - path: json
    data_files: [alpaca.jsonl]
    type:
      field_output: input
      format: "never {instruction} {input}"
      no_input_format: "{instruction}?"
test_datasets:
  - path: alpaca.jsonl
    type: alpaca_instruct.load_no_prompt
    split: train
"""


def test_a_yaml_file_gives_the_rows_of_all_its_entries():
    manifest = run(from_yaml(SEVERAL))
    assert (manifest.sequence_len, manifest.packing) == (64, "best_fit")
    assert [source.name for source in manifest.sources] == [f"mine-{n}" for n in range(1, 5)]
    bare = [f"<s>USER: do {n}\nASSISTANT:«done {n}</s>»" for n in range(0, 30, 2)]
    extra = [f"<s>USER: do {n}\nx\nASSISTANT:«done {n}</s>»" for n in range(1, 30, 2)]
    custom = [f"<s>never do {n} x«x</s>»" for n in range(1, 30, 2)]  # without input none is trained
    chats = [
        f"<|im_start|>user\nhi {n}<|im_end|>\n<|im_start|>assistant\n«hello {n}<|im_end|>\n»"
        for n in (5, 6, 7)
    ]
    assert texts() == sorted(bare + extra + custom + chats)
    evaluation = texts("evaluation")
    assert len(evaluation) == 30
    assert "<s>### Instruction:\ndo 4\n\n### Response:\n«done 4</s>»" in evaluation
    assert manifest.ledger.tokens_dropped["nothing in it is trained"] > 0
    assert manifest.sources[1].dropped_documents == {"outside the chosen rows": 17}
    assert verify(Path("out")) == []


def test_two_workers_write_the_bytes_that_one_writes():
    run(from_yaml(SEVERAL, "one"), workers=1)
    run(from_yaml(SEVERAL, "two"), workers=2)
    one, two = (
        {path.name: path.read_bytes() for path in Path(name).rglob("*") if path.is_file()}
        for name in ("one", "two")
    )
    assert one == two


def test_what_the_yaml_leaves_open_comes_from_the_config_or_axolotls_defaults():
    text = "datasets: [{path: alpaca.jsonl, type: alpaca}]"
    plain = from_yaml(text)
    assert (plain.sequence_len, plain.packing, plain.overlong) == (512, "none", "drop")
    assert plain.evaluation_fraction == 0
    own = from_yaml(text, sequence_len=100, packing="concatenate", evaluation_fraction=0.5)
    assert (own.sequence_len, own.packing, own.overlong) == (100, "concatenate", None)
    assert own.evaluation_fraction == 0.5
    asked = from_yaml(f"{text}\nexcess_length_strategy: truncate\nval_set_size: 0.1\nseed: 7")
    assert (asked.overlong, asked.evaluation_fraction, asked.seed) == ("truncate", 0.1, 7)


def test_the_yaml_may_be_named_in_a_toml_file_and_changed_by_set():
    Path("axolotl.yml").write_text("datasets: [{path: alpaca.jsonl, type: alpaca}]")
    source = 'name = "mine"\ntype = "axolotl"\npath = "axolotl.yml"\n'
    Path("p.toml").write_text(f'output = "out"\ntokenizer = "model"\n[[sources]]\n{source}')
    assert load_config(PrepareConfig, Path("p.toml"), ["sequence_len=32"]).sequence_len == 32


ENTRY = "datasets:\n  - path: alpaca.jsonl\n    type: alpaca\n"
MISTAKES = {
    "a key of an entry that is not known": (
        ENTRY + "    train_on_inputz: true\n",
        r'axolotl\.yml:4: unknown key "train_on_inputz"; did you mean "train_on_inputs"\?',
    ),
    "a value of the wrong type": (
        ENTRY + "    roles_to_train: assistant\n",
        r'axolotl\.yml:4: roles_to_train = "assistant": expected list of strings',
    ),
    "a format that is not known": (
        "datasets:\n  - path: alpaca.jsonl\n    type:\n      fromat: x\n",
        r'axolotl\.yml:4: unknown key "type\.fromat"; did you mean "type\.format"\?',
    ),
    "a type that is no name": (
        "datasets:\n  - path: alpaca.jsonl\n    type: 5\n",
        r"axolotl\.yml:3: type = 5: expected string or table",
    ),
    "a file that is not there": (
        "datasets:\n  - path: nowhere.jsonl\n    type: alpaca\n",
        r'axolotl\.yml:2: path: "nowhere\.jsonl" is neither a file nor a directory here; download',
    ),
    "a share of validation rows above all": (
        f"{ENTRY}val_set_size: 1.5\n",
        r"axolotl\.yml:4: val_set_size: 1\.5 is neither a share, such as 0\.01, nor a number of ro",
    ),
    "training without pairs or labels": (
        f"rl: grpo\n{ENTRY}",
        r'axolotl\.yml:1: rl: "grpo" makes its answers while it trains; it may be dpo',
    ),
    "another tokenizer": (
        f"{ENTRY}added_tokens_overrides: {{5: x}}\n",
        r"axolotl\.yml:4: added_tokens_overrides rewrites the tokenizer's files",
    ),
    "no data sets": ("sequence_len: 64\n", r"axolotl\.yml: no datasets; name them"),
    "no YAML": ("datasets: [", r"axolotl\.yml:1: not valid YAML"),
    "a Python object": (
        f"{ENTRY}x: !!python/object/apply:os.system ['true']\n",
        r"axolotl\.yml:4: not valid YAML: could not determine a constructor",
    ),
    "no keys": ("- 1", r"axolotl\.yml: not an Axolotl config"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_yaml_is_refused_with_its_line(mistake):
    text, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=f"^{message}"):
        from_yaml(text)


def test_names_that_are_no_local_paths_are_those_of_the_hub():
    text = "datasets: [{path: me/mill, type: alpaca, name: [a, b], split: test}]"
    assert [source.path for source in from_yaml(text).sources] == [
        ["hf:me/mill:a:test"],
        ["hf:me/mill:b:test"],
    ]
    text = "datasets: [{path: me/mill, type: alpaca, data_files: [a.jsonl, b.jsonl]}]"
    assert from_yaml(text).sources[0].path == [
        "hf://datasets/me/mill/a.jsonl",
        "hf://datasets/me/mill/b.jsonl",
    ]


def test_what_both_configs_say_must_agree():
    text = f"{ENTRY}sequence_len: 64\n"
    assert from_yaml(text, sequence_len=64).sequence_len == 64
    message = (
        r"^axolotl\.yml:4: sequence_len asks for sequence_len = 64, but the config has 32; rem"
    )
    with pytest.raises(ConfigError, match=message):
        from_yaml(text, sequence_len=32)


@pytest.mark.parametrize("kind", ["os.path", "axolotl.train", "alpacca", "nomic.load"])
def test_a_type_that_is_not_known_is_refused_by_name_and_never_imported(kind):
    loaded = set(sys.modules)
    with pytest.raises(
        ConfigError, match=rf'source "mine": axolotl type "{kind}" is not known; nea'
    ):
        run(from_yaml(f"datasets: [{{path: alpaca.jsonl, type: {kind}}}]"))
    assert not {name for name in set(sys.modules) - loaded if "axolotl" in name.split(".")[0]}


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ("[:3]", [0, 1, 2]),
        ("[-2:]", [28, 29]),
        ("[10%:20%]", [3, 4, 5]),
        ("[5:7]", [5, 6]),
        ("[40:]", []),
    ],
)
def test_slices_take_the_rows_that_they_name(rows, wanted):
    options = {"type": "alpaca_chat.load_no_prompt", "rows": rows}
    config = from_options(options, path=["chats/other.jsonl", "alpaca.jsonl"])
    write_rows("chats/other.jsonl", [])
    if not wanted:
        with pytest.raises(DataError):
            run(config)
        return
    run(config)
    assert sorted(int(text.partition("«done ")[2].partition("<")[0]) for text in texts()) == wanted


def test_slices_count_rows_over_all_files():
    write_rows("more/1.jsonl", ({"text": f"one {n}"} for n in range(4)))
    Path("more/2.json").write_text(json.dumps([{"text": f"two {n}"} for n in range(4)]))
    run(from_options({"type": "completion", "rows": "[2:6]"}, path="more/*"))
    assert texts() == [f"«<s>{text}</s>»" for text in ("one 2", "one 3", "two 0", "two 1")]


def test_shards_cut_the_rows_into_disjoint_parts_that_hold_all():
    parts = []
    for index in range(3):
        options = {"type": "alpaca", "shards": 3, "shards_idx": index}
        run(from_options(options, output=f"out{index}"))
        parts.append(texts(output=f"out{index}"))
    run(from_options({"type": "alpaca", "shards": 3}))
    assert sorted(text for part in parts for text in part) == texts()
    assert min(map(len, parts)) > 0
    run(from_options({"type": "alpaca", "weight": 0.5}, output="half"))
    assert 5 < len(texts(output="half")) < 25
    assert {*texts(output="half")} < {*texts()}


def test_samples_that_are_too_short_are_counted():
    write_rows("short.jsonl", [{"text": "a longer text"}, {"text": "x"}])
    manifest = run(from_options({"type": "completion", "min_sample_len": 4}, path="short.jsonl"))
    assert texts() == ["«<s>a longer text</s>»"]
    assert manifest.ledger.tokens_dropped == {"shorter than min_sample_len": 3}


def test_a_long_sample_stops_the_run_where_the_yaml_says_so():
    text = f"{ENTRY}sequence_len: 16\nexcess_length_strategy: raise\n"
    with pytest.raises(
        DataError, match=r"^alpaca\.jsonl:1: \d+ tokens, more than sequence_len = 16"
    ):
        run(from_yaml(text))


def test_prompt_and_answer_are_cut_apart_and_counted():
    write_rows("alpaca.jsonl", [{"instruction": "a", "output": "water " * 40}])
    options = {"type": "alpaca_chat.load_no_prompt"}
    manifest = run(from_options(options, sequence_len=16, overlong="truncate"))
    assert list(manifest.ledger.tokens_dropped) == [
        "cut by the format",
        "overlong document truncated",
    ]
    assert min(manifest.ledger.tokens_dropped.values()) > 1
    assert manifest.ledger.difference() == 0


def test_tokens_of_the_yaml_are_added_and_the_tokenizer_beside_the_shards_has_them():
    text = f'{ENTRY}tokens: ["<|wheel|>"]\nspecial_tokens: {{eos_token: "<|stop|>"}}\n'
    write_rows("alpaca.jsonl", [{"instruction": "a", "output": "<|wheel|><|wheel|> b"}])
    manifest = run(from_yaml(text))
    tokenizer = Tokenizer.from_file("out/tokenizer.json")
    wheel, stop = (tokenizer.token_to_id(token) for token in ("<|wheel|>", "<|stop|>"))
    (row,) = pq.read_table("out/shard-00000.parquet").to_pylist()
    assert row["input_ids"].count(wheel) == 2
    assert row["input_ids"][-1] == stop
    assert manifest.tokenizer.fingerprint == file_sha256(Path("out/tokenizer.json"))
    assert manifest.tokenizer.vocabulary_size == max(wheel, stop) + 1
    assert manifest.tokenizer.special_tokens["eos"] == stop
    assert verify(Path("out")) == []


def test_pretraining_sets_become_windows():
    write_rows("text.jsonl", ({"body": f"{n} " + "water " * 40} for n in range(5)))
    text = (
        "sequence_len: 32\npretraining_dataset:\n"
        "  - {path: text.jsonl, text_column: body, skip: 3}\n"
    )
    run(from_yaml(text))
    found = texts()
    assert all(text.endswith("</s>»") for text in found)
    assert {text.split()[0] for text in found} >= {"«<s>3", "«<s>4"}
    assert not any(text.startswith("«<s>2 ") for text in found)


def test_preference_sets_give_pairs():
    write_rows(
        "pairs.jsonl", ({"question": f"q {n}", "chosen": "yes", "rejected": "no"} for n in range(4))
    )
    manifest = run(from_yaml("rl: dpo\ndatasets: [{path: pairs.jsonl, type: chatml.intel}]"))
    assert manifest.kind == "preference"
    prompt = "<s><|im_start|>user\nq {}<|im_end|>\n<|im_start|>assistant\n«{}<|im_end|></s>»"
    assert texts() == [prompt.format(n, "yes") for n in range(4)]
    assert [
        text.replace("«", "").replace("»", "") for text in texts(column="rejected_input_ids")
    ] == [prompt.format(n, "no").replace("«", "").replace("»", "") for n in range(4)]
    assert verify(Path("out")) == []


KTO_CHATML = "<s><|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n«{}<|im_end|></s>»"
KTO_LLAMA = (  # the line ends are tokens of another kind before a text, and so trained with it
    "<s><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>«\n\n{}<|eot_id|></s>»"
)
KTO_TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("chatml.argilla", {"instruction": "q", "completion": "yes"}, KTO_CHATML),
        ("chatml.intel", {"question": "q", "completion": "yes"}, KTO_CHATML),
        ("chatml.prompt_pairs", {"prompt": "q", "completion": "yes"}, KTO_CHATML),
        ("chatml.ultra", {"prompt": "q", "completion": "yes"}, KTO_CHATML),
        ("chatml.argilla_chat", {"completion": KTO_TALK}, KTO_CHATML),
        ("llama3.argilla", {"instruction": "q", "completion": "yes"}, KTO_LLAMA),
        ("llama3.ultra", {"prompt": "q", "completion": "yes"}, KTO_LLAMA),
        ("llama3.argilla_chat", {"completion": KTO_TALK}, KTO_LLAMA),
        (
            "{field_prompt: a, field_completion: b, field_label: c, prompt_format: 'Q {prompt}: '}",
            {"a": "q", "b": "yes", "c": True},
            "<s>Q {}: «{}</s>»",
        ),
        ("passthrough", {"prompt": "q\n", "completion": "yes</s>"}, "<s>{}\n«{}</s>»"),
    ],
)
def test_rows_of_kto_give_answers_with_labels(kind, row, expected):
    write_rows("answers.jsonl", [{"label": False} | row])
    manifest = run(from_yaml(f"rl: kto\ndatasets: [{{path: answers.jsonl, type: {kind}}}]"))
    assert manifest.kind == "unpaired"
    assert texts() == [expected.format("q", "yes")]
    (table,) = [pq.read_table(path) for path in Path("out").glob("shard*.parquet") if path.stat()]
    assert table["desirable"].to_pylist() == ["c" in row]
    assert verify(Path("out")) == []


def test_removed_sharegpt_types_work():
    rows = [
        {
            "conversations": [
                {"role": "assistant", "text": "early"},
                {"role": "prompter", "text": "q"},
                {"role": "assistant", "text": "a"},
                {"role": "prompter", "text": "r"},
                {"role": "assistant", "text": "masked", "weight": 0},
            ]
        },
    ]
    write_rows("guanaco.jsonl", rows)
    options = {
        "type": "sharegpt.load_guanaco",
        "conversation": "chatml",
        "eot_tokens": ["<|im_end|>"],
    }
    run(from_options(options, path="guanaco.jsonl"))
    (row,) = pq.read_table("out/shard-00000.parquet").to_pylist()
    tokenizer = Tokenizer.from_file("model/tokenizer.json")
    trained = [i for i, on in zip(row["input_ids"], row["loss_mask"], strict=True) if on]
    assert tokenizer.decode(trained, skip_special_tokens=False) == "a<|im_end|>"
    assert "early" not in tokenizer.decode(row["input_ids"])


def test_validation_rows_may_be_a_number():
    write_rows("many.jsonl", [{"text": f"stone {number}"} for number in range(400)])
    entry = "datasets: [{path: many.jsonl, type: completion, split: 'train[:300]'}]"
    manifest = run(from_yaml(f"{entry}\nval_set_size: 60"))
    assert manifest.sources[0].documents == 400
    assert 45 <= sum(shard.rows for shard in manifest.split("evaluation")) <= 75
    with pytest.raises(DataError, match="evaluation_documents = 300, but there are 300 records"):
        run(from_yaml(f"{entry}\nval_set_size: 300", "all"))


def test_lines_of_text_are_rows():
    Path("lines.txt").write_bytes(b"stone mill\r\n\n  \nwater wheel\nlast")
    entry = "datasets:\n  - path: lines.txt\n    type: completion\nsequence_len: 256\n"
    run(from_yaml(entry))
    assert texts() == ["«<s>last</s>»", "«<s>stone mill</s>»", "«<s>water wheel</s>»"]
    entry = (
        "datasets:\n  - {path: text, data_files: lines.txt, split: 'train[:1]', type: completion}"
    )
    run(from_yaml(entry, "first"))
    assert texts(output="first") == ["«<s>stone mill</s>»"]
    with pytest.raises(ConfigError, match=r"axolotl\.yml:2: lines of text have no token ids; set"):
        from_yaml("datasets:\n  - path: lines.txt\n")


def test_jokes_are_told_and_explained():
    write_rows("jokes.jsonl", [{"title": "Mill", "text": "It grinds.", "explanation": "A pun."}])
    run(from_options({"type": "sharegpt_jokes"}, path="jokes.jsonl"))
    (text,) = texts()
    assert [
        part.partition("<|im_end|>")[0] for part in text.replace("«", "").split("\n")[1::2]
    ] == ["Tell me a joke.", "Mill It grinds.", "Why is that joke funny?", "A pun."]


def test_readmes_response_column_is_taken_where_output_is_missing():
    write_rows("alpaca.jsonl", [{"instruction": "a", "response": "b"}])
    run(from_options({"type": "alpaca_chat.load_concise"}))
    assert texts()[0].endswith("«b</s>»")


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    ("rl", "kind"),
    [
        ("dpo", "chatml.ultra"),
        ("dpo", "llama3.argilla_chat"),
        ("orpo", "chat_template.argilla"),
        (None, "orpo.chat_template"),
    ],
)
def test_tool_calls_of_an_answer_are_never_left_out_in_silence(rl, kind, side):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    row = {"prompt": "q", "chosen": turns, "rejected": turns}
    called = {"role": "assistant", "content": "no", "tool_calls": [{"function": {"name": "f"}}]}
    write_rows("pairs.jsonl", [row, row | {side: [turns[0], called]}])
    text = (f"rl: {rl}\n" if rl else "") + "chat_template: chatml\n"
    text += f"datasets: [{{path: pairs.jsonl, type: {kind}}}]"
    run(from_yaml(text, max_reject_fraction=0.9))
    (reject,) = map(json.loads, Path("out/rejects/rejects.jsonl").read_text().splitlines())
    assert (reject["line"], reject["reason"]) == (2, "tool calls")
    assert len(texts()) == 1


def test_a_bad_row_leaves_its_neighbors():
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "no output"},
        {"output": 5, "instruction": "c"},
    ]
    write_rows("alpaca.jsonl", [*rows, {"instruction": "d", "output": "e"}])
    run(from_options({"type": "alpaca"}, max_reject_fraction=0.9))
    rejects = [
        json.loads(line) for line in Path("out/rejects/rejects.jsonl").read_text().splitlines()
    ]
    assert [(one["line"], one["reason"], one["detail"]) for one in rejects] == [
        (2, "missing field", 'no field "output"; the record has "instruction"'),
        (3, "not a string", 'field "output" is a number'),
    ]
    assert len(texts()) == 2


@pytest.mark.skipif(find_spec("axolotl") is not None, reason="Axolotl is installed")
def test_axolotl_itself_is_asked_for_by_the_lines_that_install_it():
    source = {"name": "mine", "type": "axolotl", "path": "alpaca.jsonl", "engine": "axolotl"}
    message = (
        r"^source \"mine\": engine = \"axolotl\": No module named '\w+'; run pip install "
        r"'\.\[axolotl\]' in a clone of Headrace, then pip install --no-deps axolotl==0\.19\.0$"
    )
    with pytest.raises(ConfigError, match=message):
        run(make([source | {"axolotl": {"type": "alpaca"}}]))


@pytest.mark.skipif(find_spec("axolotl") is None, reason="Axolotl is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["alpaca:chat", "alpaca_instruct", "completion", "chat_template"])
def test_axolotl_itself_gives_the_same_rows(kind):
    options = {"type": kind} | ({"field": "output"} if kind == "completion" else {})
    path = "alpaca.jsonl"
    if kind == "chat_template":
        path = "chats/train.jsonl"
        options |= {"field_messages": "conversations"}
        options |= {"message_property_mappings": {"role": "from", "content": "value"}}
    for engine in ("headrace", "axolotl"):
        source = {"name": "mine", "type": "axolotl", "path": path, "axolotl": options}
        run(make([source | {"engine": engine}], engine, **DIRECT))
    assert texts(output="axolotl") == texts(output="headrace")
