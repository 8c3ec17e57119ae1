"""A run saves when it is asked to, by a signal or a file, and goes on; save_quit ends it."""

import signal

import pytest
from background_run import Run

pytestmark = pytest.mark.slow


def test_a_signal_and_a_file_save_and_another_file_saves_and_quits(training, tmp_path):
    run = Run(training, tmp_path / "asked", checkpoint__every_steps=None, max_steps=3000)
    run.wait_until(lambda: run.last_step() >= 2)
    assert not run.checkpoints.exists()

    run.launcher.send_signal(signal.SIGUSR1)
    run.wait_until(lambda: len(list(run.checkpoints.glob("step-*"))) == 1)
    (run.directory / "save").touch()
    run.wait_until(lambda: len(list(run.checkpoints.glob("step-*"))) == 2)
    assert run.launcher.poll() is None

    (run.directory / "save_quit").touch()
    run.finish()
    assert (run.checkpoints / f"step-{run.last_step():06d}").is_dir()
    assert not list(run.directory.glob("save*"))
