"""What a command writes is there as a whole, or not at all."""

import errno
import multiprocessing

import pytest
import torch

from headrace.schemas.errors import ConfigError, OutputError
from headrace.trainer.architecture.model_writer import save_tensors
from headrace.trainer.export.output import new_output


@pytest.mark.parametrize("make", [lambda p: p.write_text("a"), lambda p: p.mkdir()])
def test_it_has_its_name_when_it_is_finished_and_nothing_is_left_otherwise(tmp_path, make):
    output = tmp_path / "below" / "output"
    with pytest.raises(RuntimeError, match="half way"), new_output(output) as temporary:
        make(temporary)
        raise RuntimeError("half way")
    assert list(output.parent.iterdir()) == []
    with new_output(output) as temporary:
        make(temporary)
        assert not output.exists()
    assert list(output.parent.iterdir()) == [output]
    with pytest.raises(ConfigError, match="exists already; remove it"), new_output(output):
        pytest.fail("it was there")


def test_what_a_killed_command_left_is_cleared_away(tmp_path):
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "half").touch()
    with new_output(tmp_path / "model") as temporary:
        temporary.mkdir()
    assert list((tmp_path / "model").iterdir()) == []


def hold(path, ready, release):
    with new_output(path):
        ready.set()
        release.wait(60)


def test_two_commands_never_write_one_output_at_once_and_a_dead_one_holds_nothing(tmp_path):
    output, context = tmp_path / "model", multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(output, ready, release))
    other.start()
    assert ready.wait(60)
    with pytest.raises(ConfigError, match=f"process {other.pid} is writing it"), new_output(output):
        pytest.fail("another process has it")
    other.kill()
    other.join()
    with new_output(output) as temporary:
        temporary.mkdir()
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")],
)
def test_a_full_disk_is_named_with_its_remedy_and_nothing_is_left(tmp_path, number, reason):
    with pytest.raises(OutputError) as caught, new_output(tmp_path / "model") as temporary:
        temporary.mkdir()
        raise OSError(number, reason)
    assert str(caught.value) == (
        f"{tmp_path}/model: cannot be written ({reason}); make room, and run the command again"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"cannot be written \(Not a directory\)"),
        new_output(tmp_path / "file" / "below" / "model"),
    ):
        pytest.fail("there is no such place")


def test_a_safetensors_file_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match="No such file") as caught:
        save_tensors({"a": torch.zeros(2)}, tmp_path / "missing" / "a.safetensors")
    assert caught.value.errno == errno.ENOENT
