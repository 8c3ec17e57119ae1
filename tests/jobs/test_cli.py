"""The command line: help with an example, and one line for every mistake of a user."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from headrace.jobs import cli
from headrace.jobs.commands import machine, train
from headrace.schemas.errors import ConfigError

COMMANDS = [
    command.name or command.callback.__name__.replace("_", "-")
    for group in cli.app.registered_groups
    for command in group.typer_instance.registered_commands
]
TRAIN = """\
model = "models/none"
output_dir = "run"
pipeline_stages = 2
datasets = [{ path = "shards/none" }]
optimizer.lr = 1e-4
"""


def failure(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return str(stop.value.code)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_has_a_worked_example(command, capsys):
    assert failure(command, "--help") == "0"
    assert f"Example: headrace {command} " in capsys.readouterr().out


def test_a_mistake_is_one_line_on_stderr_and_exit_code_1(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "headrace.jobs.cli", "prepare", "none.toml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "error: none.toml: not found; give the path of a TOML config\n"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_anywhere_shows_the_traceback(place):
    words = ["prepare", "none.toml"]
    words.insert(place, "--debug")
    with pytest.raises(ConfigError, match="not found"):
        cli.main(words)


def test_each_of_several_mistakes_is_a_line(tmp_path):
    (tmp_path / "train.toml").write_text(
        TRAIN.replace("pipeline_stages", "stages") + "seed = 'a'\n"
    )
    lines = failure("train", str(tmp_path / "train.toml")).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"error: {tmp_path}/train.toml:") for line in lines)


def test_training_is_checked_before_any_process_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.toml").write_text(TRAIN)
    assert failure("train", "train.toml").startswith("error: models/none: no such directory, and ")
    assert failure("train", "train.toml", "--gpus", "3") == (
        "error: pipeline_stages = 2 does not divide the 3 processes; "
        "use --gpus 2 or another pipeline_stages"
    )


def test_all_gpus_are_used_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(machine, "count_gpus", lambda: 4)
    assert machine.count_processes(None, 2) == 4
    assert machine.count_processes(2, 2) == 2
    with pytest.raises(ConfigError, match="--gpus 8: this machine has 4; ask for fewer"):
        machine.count_processes(8, 2)
    with pytest.raises(ConfigError, match="pipeline_stages = 3 does not divide the 4 processes"):
        machine.count_processes(None, 3)


def test_without_gpus_there_is_a_process_for_each_stage(monkeypatch):
    monkeypatch.setattr(machine, "count_gpus", lambda: 0)
    assert machine.count_processes(None, 3) == 3
    assert machine.count_processes(6, 3) == 6
    assert machine.count_processes(None, 4, nodes=2) == 2
    assert machine.count_processes(2, 4, nodes=2) == 2
    with pytest.raises(ConfigError, match="does not divide the 4 processes of 2 nodes"):
        machine.count_processes(2, 3, nodes=2)


def test_a_missing_extra_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(
        train, "find_spec", lambda name: SimpleNamespace() if name == "torch" else None
    )
    (tmp_path / "train.toml").write_text(TRAIN)
    assert failure("train", str(tmp_path / "train.toml")) == (
        "error: deepspeed is not installed; run in a clone of Headrace: pip install '.[train]'"
    )


def test_a_module_that_no_extra_brings_is_our_bug(monkeypatch):
    monkeypatch.setattr(
        cli, "app", lambda *words, **extra: __import__("a_module_that_is_not_there")
    )
    with pytest.raises(ModuleNotFoundError):
        cli.main([])
