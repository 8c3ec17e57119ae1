"""One process trains in a run's directory; what is wrong with the directory is one line."""

import errno
import multiprocessing

import pytest

from headrace.schemas.errors import ConfigError, OutputError
from headrace.trainer.run.run_directory import LOCK_NAME, open_run_directory


def hold(directory, ready, release):
    with open_run_directory(directory, writes=True):
        ready.set()
        release.wait(60)


def test_a_second_process_is_refused_until_the_first_has_ended_however_it_did(tmp_path):
    run, context = tmp_path / "run", multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    first = context.Process(target=hold, args=(run, ready, release))
    first.start()
    assert ready.wait(60)
    message = f"{run}: process {first.pid} trains there; wait for its end, or set another output"
    with pytest.raises(ConfigError, match=message), open_run_directory(run, writes=True):
        pytest.fail("another process trains there")
    first.kill()
    first.join()
    assert (run / LOCK_NAME).exists(), "left behind, and held by no one"
    with open_run_directory(run, writes=True):
        (run / "train.json").touch()
    assert [path.name for path in run.iterdir()] == ["train.json"]


def test_a_refused_run_leaves_no_directory(tmp_path):
    with pytest.raises(RuntimeError), open_run_directory(tmp_path / "run", writes=True):
        raise RuntimeError("no shards")
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_do_not_write_hold_nothing(tmp_path):
    run = tmp_path / "run"
    with open_run_directory(run, writes=True), open_run_directory(run, writes=False):
        assert (run / LOCK_NAME).exists()


def test_a_file_and_a_place_that_cannot_be_made_are_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="file: is a file; set output_dir to a directory"),
        open_run_directory(tmp_path / "file", writes=True),
    ):
        pytest.fail("it is a file")
    with (
        pytest.raises(OutputError, match=r"run: cannot be written \(Not a directory\); set output"),
        open_run_directory(tmp_path / "file" / "run", writes=True),
    ):
        pytest.fail("its parent is a file")


def test_a_disk_that_fills_up_is_named_with_the_directory_and_other_errors_stay(tmp_path):
    with (
        pytest.raises(OutputError, match=r"run: cannot be written \(No space left.*--resume"),
        open_run_directory(tmp_path / "run", writes=True),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConnectionError), open_run_directory(tmp_path / "run", writes=False):
        raise ConnectionResetError
