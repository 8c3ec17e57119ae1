"""A run in the background, killed and resumed."""

import time

import psutil
import torch
from runs import (
    as_toml,
    children,
    start,
)

STEPS = 20
SETTINGS = {"max_steps": STEPS, "pipeline_stages": 2, "checkpoint__every_steps": 2}


class Run:
    """A two-stage run in the background."""

    def __init__(self, training, directory, start=start, **changes):
        self.directory = directory
        self.checkpoints = directory / "checkpoints"
        sets = {"output_dir": str(directory), **SETTINGS, **changes}
        options = [
            part
            for key, value in sets.items()
            if value is not None
            for part in ("--set", as_toml(key, value))
        ]
        resume = ["--resume"] if (directory / "train.json").exists() else []
        self.log = directory.parent / f"{directory.name}.log"
        self.launcher = start(training.command(2, *options, *resume), self.log)

    def last_step(self):
        if not (self.directory / "metrics.jsonl").exists():
            return 0
        lines = (self.directory / "metrics.jsonl").read_text().splitlines(keepends=True)
        return sum('"kind": "train"' in line for line in lines if line.endswith("\n"))

    def wait_until(self, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert self.launcher.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.0005)

    def is_saving(self):
        return any(self.checkpoints.glob(".step-*.tmp"))

    def kill_all(self):
        """SIGKILL to launcher and ranks, the ranks first."""
        processes = children(self.launcher)
        for process in processes:
            process.kill()
        self.launcher.kill()
        self.launcher.wait(timeout=60)
        psutil.wait_procs(processes, timeout=60)

    def finish(self):
        assert self.launcher.wait(timeout=150) == 0, self.log.read_text()[-3000:]


def assert_same_tensors(ours, expected):
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
