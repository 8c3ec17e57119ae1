"""`headrace init`: what it sees in files, and configs that load, fit and run."""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from headrace.dataprep.dry_run import estimate
from headrace.jobs.commands.train import fit_by_plans
from headrace.jobs.first_run.fit import NF4
from headrace.jobs.first_run.init import Forecasts, Wanted, init
from headrace.jobs.first_run.look import Abilities, look
from headrace.jobs.first_run.machine import Fit, Machine
from headrace.jobs.first_run.write import accumulation, length_lines, prepare_toml, train_toml
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig

MODEL = Path(__file__).parents[3] / "models" / "smollm2-135m"
GIB = 1 << 30
CHATTING = Abilities(True)
CHAT = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
ROWS = {
    "chat": (CHAT, "chat", {}),
    "sharegpt": ({"conversations": []}, "chat", {"chat": {"field": "conversations"}}),
    "prompts": ({"prompt": "a", "completion": "b"}, "chat", {}),
    "questions": (
        {"question": "a", "answer": "b", "id": 3},
        "chat",
        {"chat": {"prompt": "question", "completion": "answer"}},
    ),
    "alpaca": (
        {"instruction": "a", "input": "x", "output": "b"},
        "chat",
        {"chat": {"prompt": "instruction", "completion": "output", "prompt_input": "input"}},
    ),
    "pairs": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "preference",
        {"preference": {"as_chat": True}},
    ),
    "ids": ({"input_ids": [1, 2, 3]}, "pretokenized", {}),
    "documents": ({"text": "a", "url": "a much longer text than that"}, "documents", {}),
    "longest": ({"id": "a", "abstract": "longer"}, "documents", {"text_field": "abstract"}),
}


def write_lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_told_by_their_fields(name, tmp_path):
    row, kind, settings = ROWS[name]
    (found,) = look([write_lines(tmp_path / "rows.jsonl", row)], CHATTING)
    assert (found.kind.type, found.kind.settings, found.kind.problem) == (kind, settings, "")


def test_alpaca_rows_keep_their_own_form_where_there_is_no_chat_template(tmp_path):
    rows = write_lines(tmp_path / "rows.jsonl", ROWS["alpaca"][0])
    (found,) = look([rows], Abilities(False))
    assert (found.kind.type, found.kind.settings) == ("axolotl", {"axolotl": {"type": "alpaca"}})


def test_pages_and_books_are_texts_that_a_library_takes_out(tmp_path):
    for name in ("page.html", "paper.pdf", "book.epub"):
        (tmp_path / name).write_text("<p>text</p>")
    kinds = {item.files[0].name: item.kind for item in look([tmp_path], CHATTING)}
    assert {name: kind.settings["extract"] for name, kind in kinds.items()} == {
        "page.html": "html",
        "paper.pdf": "pdf",
        "book.epub": "epub",
    }
    assert all(kind.type == "text" and not kind.problem for kind in kinds.values())


PICTURED = [
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>?"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
    {"images": ["a.jpg"], "prompt": "?", "chosen": "a", "rejected": "b"},
    {"messages": [{"user": ["What is <image>?", "a.png"]}, {"assistant": "a mill"}]},
]


@pytest.mark.parametrize("row", PICTURED, ids=["LLaVA", "parts", "pairs", "jllm"])
def test_rows_with_pictures_need_a_model_that_sees(row, tmp_path):
    rows = write_lines(tmp_path / "rows.jsonl", row)
    (found,) = look([rows], CHATTING)
    assert found.kind.problem == "rows with pictures, which the model has no processor for"
    (found,) = look([rows], Abilities(True, pictures=True))
    assert (found.kind.problem, found.kind.pictures) == ("", True)
    text = prepare_toml(Path("m"), Path("out"), [found], 64, 0.1)
    assert (
        f'[images]\nmodel = "m"  # its processor decides sizes and tokens\nfolder = "{tmp_path}"'
        in text
    )
    PrepareConfig.model_validate(tomllib.loads(text))


def test_a_folder_is_sorted_into_sources_and_what_cannot_be_used_is_named(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_text("some text")
    (tmp_path / "b.txt").write_text("more text")
    (tmp_path / ".hidden.txt").write_text("not for us")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    (tmp_path / "c.xyz").write_text("?")
    pq.write_table(pa.table({"content": ["long text"], "id": [1]}), tmp_path / "t.parquet")
    found = look([tmp_path], CHATTING)
    usable = {item.kind.type: item for item in found if not item.kind.problem}
    assert usable["text"].patterns() == [f"{tmp_path}/**/*.md", f"{tmp_path}/**/*.txt"]
    assert usable["documents"].kind.settings == {"text_field": "content"}
    problems = {item.files[0].name: item.kind.problem for item in found if item.kind.problem}
    assert "a picture by itself" in problems["photo.png"]
    assert "unknown ending" in problems["c.xyz"]
    assert len(problems) == 2


def test_conversations_without_a_chat_template_are_left_out_with_the_reason(tmp_path):
    (found,) = look([write_lines(tmp_path / "c.jsonl", CHAT)], Abilities(False))
    assert found.kind.problem == "conversations, and the tokenizer has no chat template"


def test_what_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        look([tmp_path / "none"], CHATTING)
    with pytest.raises(DataError, match="no files"):
        look([tmp_path], CHATTING)


@pytest.fixture
def wanted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "notes").mkdir()
    for number in range(40):
        (tmp_path / "notes" / f"{number}.md").write_text(f"note {number} " * 200)
    write_lines(tmp_path / "chats.jsonl", *[CHAT] * 30)
    return Wanted(Path("model"), (Path("notes"), Path("chats.jsonl")), Path("mine"))


def run(wanted: Wanted, machine: Machine) -> str:
    console = Console(markup=False, width=200)
    with console.capture() as capture:
        init(wanted, console, Forecasts(estimate, fit_by_plans), machine)
    return capture.get()


def test_both_configs_load_and_say_what_fits_the_machine(wanted):
    said = run(wanted, Machine(4, 24 * GIB, "RTX 3090"))
    prepare = load_config(PrepareConfig, Path("mine/prepare.toml"))
    train = load_config(TrainConfig, Path("mine/train.toml"))
    assert [source.type for source in prepare.sources] == ["text", "chat"]
    assert 0.3 < prepare.evaluation_fraction * 70 / 32 < 1.1 or prepare.evaluation_fraction == 0.1
    assert prepare.sequence_len == 2048
    assert train.pipeline_stages == 1  # a model of 135M fits one GPU, so there are four replicas
    assert "headrace train mine/train.toml --gpus 4" in said
    assert 'headrace sample model --adapter mine/run/adapter "a question" --chat' in said
    assert "30 file(s)" not in said
    assert "40 file(s)" in said


def test_the_next_commands_are_called_as_this_one_was(wanted):
    wanted = replace(wanted, data=(Path("notes"),), program=".venv/bin/headrace")
    said = run(wanted, Machine())
    assert "  .venv/bin/headrace prepare mine/prepare.toml" in said
    assert "--chat" not in said


@pytest.mark.parametrize(
    ("steps", "gpus", "line"),
    [
        (100, 1, "epochs = 1"),
        (20, 1, "epochs = 2"),
        (5, 1, "epochs = 3"),
        (25, 0, "epochs = 2"),
        (60, 0, "epochs = 1"),
        (400, 0, "max_steps = 78"),
    ],
)
def test_few_rows_are_seen_several_times_and_many_only_begun_without_a_gpu(steps, gpus, line):
    (said,) = length_lines(steps, 512, Machine(gpus, GIB, "GPU"))
    assert said.startswith(f"{line}  #")


def test_keys_of_the_optimizer_stand_in_its_table(tmp_path):
    values = {"model": "m", "output_dir": "r", "datasets": [{"path": "s"}]}
    changes = {"optimizer.shard": True, "activation_checkpointing": "full"}
    values["optimizer"] = {"lr": 1e-4}
    fitting = Fit(2, changes, replicas=2)
    text = train_toml(values, fitting, Machine(4, GIB, "GPU"), 1000, 2048)
    (tmp_path / "train.toml").write_text(text)
    config = load_config(TrainConfig, tmp_path / "train.toml")
    assert config.optimizer.shard
    assert (config.optimizer.lr, config.activation_checkpointing) == (1e-4, "full")
    assert config.gradient_accumulation_steps == 8


def test_written_configs_are_kept_unless_forced(wanted):
    run(wanted, Machine())
    with pytest.raises(ConfigError, match=r"mine/prepare\.toml: is there already"):
        run(wanted, Machine())
    run(Wanted(wanted.model, wanted.data, wanted.folder, force=True), Machine())


def test_pairs_are_trained_by_dpo_and_not_beside_other_rows(wanted):
    pairs = write_lines(Path("pairs.jsonl"), *[ROWS["pairs"][0]] * 60)
    with pytest.raises(DataError, match="pairs and other rows"):
        run(Wanted(wanted.model, (Path("notes"), pairs), wanted.folder), Machine())
    run(Wanted(wanted.model, (pairs,), wanted.folder), Machine())
    assert tomllib.loads(Path("mine/train.toml").read_text())["objective"] == {"kind": "dpo"}


def test_nothing_usable_and_no_model_are_refused(wanted):
    Path("x.png").write_bytes(b"")
    with pytest.raises(DataError, match="nothing there can be trained on"):
        run(Wanted(wanted.model, (Path("x.png"),), wanted.folder), Machine())
    with pytest.raises(ConfigError, match=r"notes: no config\.json"):
        run(Wanted(Path("notes"), wanted.data, wanted.folder), Machine())
    assert not Path("mine").exists()


def test_less_memory_saves_where_it_can_and_takes_fewer_bits_last(wanted):
    values = {
        "model": "model",
        "output_dir": "run",
        "datasets": [{"path": "shards"}],
        "optimizer": {"lr": 1e-4},
    }
    ample, tight, none = (
        fit_by_plans(values, 2048, Machine(2, int(gib * GIB), "GPU")) for gib in (8, 1.5, 0.01)
    )
    assert (ample.stages, ample.replicas, ample.changes) == (1, 2, {})
    assert (tight.fits, none.fits) == (True, False)
    assert tight.changes
    assert "quantization" not in tight.changes
    assert none.changes["quantization"] == NF4
    assert none.peak < tight.peak <= 1.5 * GIB
    assert not {"gradient_accumulation_steps", "pipeline_stages"} & none.changes.keys()


def test_a_step_has_enough_micro_batches_for_its_stages_and_leaves_enough_steps():
    assert accumulation(10_000, 1, 1) == 64
    assert accumulation(80, 1, 1) == 2
    assert accumulation(10, 1, 4) == 16
    assert accumulation(10_000, 8, 1) == 8
