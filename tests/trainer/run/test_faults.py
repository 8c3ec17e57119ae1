"""Whatever fails while a run reads its data: no hang, a named error, no row lost or repeated.

Each fault is a real signal or real damage. The short form meets every fault once, the exhaustive
form twenty times, at random moments; both end by comparing rows, losses and norms with those of a
run that nothing happened to.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import as_toml, children, exact_metrics, start
from s3_server import S3Server

from headrace.schemas.shards.manifest_file import read_manifest

pytestmark = pytest.mark.slow

LONGEST_END = 90  # seconds without a step or a line until the last process has ended
LONGEST_SILENCE = 240  # the same of a run that goes on; a busy machine takes two minutes to start
SHORT_STEPS, LONG_STEPS = 18, 90
DAMAGED_STEPS = 220  # a run goes on for up to eleven steps before it meets the damage
ON_S3 = {"datasets__0__path": "s3://bucket/tiny"}
SETTINGS = {
    "pipeline_stages": 2,
    "checkpoint__every_steps": 1,
    "checkpoint__keep_last": 1,
    "loader__shuffle_window": 1,  # another row group every four steps
    "loader__prefetch_batches": 1,
    "loader__read_attempts": 6,
    "loader__read_timeout": 2.0,
    "evaluation__before_first_step": False,
}


class Job:
    """A run of two stages that goes on from process to process, and faults to inject into it."""

    def __init__(self, training, shards, steps, **changes):
        self.training = training
        self.directory = training.directory / "faulty"
        self.log = training.directory / "faulty.log"
        self.shards = shards
        self.steps = steps
        self.settings = SETTINGS | {"max_steps": steps, "datasets__0__path": str(shards)} | changes
        self.launcher = None
        self.shared_memory = set()  # files in /dev/shm that a rank has had open or mapped

    def start(self):
        self.first_step = self.step()
        sets = {"output_dir": str(self.directory), **self.settings}
        options = [part for key, value in sets.items() for part in ("--set", as_toml(key, value))]
        resume = ["--resume"] if (self.directory / "train.json").exists() else []
        self.launcher = start(self.training.command(2, *options, *resume), self.log)

    def step(self):
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return 0
        lines = path.read_bytes().splitlines(keepends=True)
        return sum(b'"kind": "train"' in line for line in lines if line.endswith(b"\n"))

    def running(self):
        return self.launcher is not None and self.launcher.poll() is None

    def reach(self, step):
        """Start the run if it does not run, and wait for so many steps, and a new one."""
        if not self.running():
            self.start()
        step = max(step, self.first_step + 1)
        self.goes_on(lambda: self.step() < step and self.running(), LONGEST_SILENCE)
        assert self.step() >= step, f"ended before step {step}: {self.tail()}"
        for rank in self.ranks():
            paths = [part.path for part in (*rank.memory_maps(), *rank.open_files())]
            self.shared_memory |= {path for path in paths if path.startswith("/dev/shm/")}

    def ranks(self):
        """The processes of leader and follower, which are started in this order."""
        leader, follower = sorted(
            psutil.Process(self.launcher.pid).children(), key=lambda process: process.pid
        )
        return leader, follower

    def ends(self):
        """Wait until every process has ended; returns the exit code."""
        ranks = children(self.launcher)
        self.goes_on(self.running, LONGEST_END)
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert alive == []
        return self.launcher.returncode

    def goes_on(self, condition, longest):
        """Wait while it holds; at most so many seconds without a step or a line of the log.

        On a busy machine a step may take seconds, and batches that were read before a file was
        damaged still make steps.
        """
        seen, deadline = None, 0.0
        while condition():
            if (now := (self.step(), self.log.stat().st_size)) != seen:
                seen, deadline = now, time.monotonic() + longest
            assert time.monotonic() < deadline, f"hangs: {self.tail()}"
            time.sleep(0.005)

    def tail(self):
        return self.log.read_text()[-2000:] if self.log.exists() else ""

    def retries(self):
        return self.log.read_bytes().count(b"trying again")

    def last_line(self):
        return self.tail().splitlines()[-1]

    def close(self):
        """Leave nothing behind when a test fails."""
        if self.running():
            self.launcher.kill()
            self.launcher.wait()

    def finish(self):
        if not self.running():
            self.start()
        self.goes_on(self.running, LONGEST_SILENCE)
        assert self.launcher.returncode == 0, self.tail()


# --- faults: each takes a running job, and leaves one that runs or can be started again ---


def kill_leader(job, choose):
    job.ranks()[0].kill()
    assert job.ends() == 128 + signal.SIGKILL
    assert "was ended by SIGKILL" in job.last_line()


def kill_follower(job, choose):
    job.ranks()[1].kill()
    assert job.ends() == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in job.last_line()


def kill_all(job, choose):
    processes = [*job.ranks(), psutil.Process(job.launcher.pid)]
    choose.shuffle(processes)
    for process in processes:
        process.kill()
    job.launcher.wait(timeout=LONGEST_END)
    assert psutil.wait_procs(processes, timeout=60)[1] == []


def terminate(job, choose):
    """SIGTERM to the launcher, or to one rank alone."""
    processes = [job.launcher, *job.ranks()]
    choose.choice(processes).send_signal(signal.SIGTERM)
    assert job.ends() == 0


def stop_and_continue(job, choose):
    leader = job.ranks()[0]
    leader.suspend()
    try:
        time.sleep(choose.uniform(0.2, 1.0))
        assert job.running()
    finally:
        leader.resume()


def flip_bits(path, record):
    """In place: a file that is written anew is short for a moment."""
    with path.open("r+b") as file:
        for group in record.row_groups:
            middle = group.byte_offset + group.bytes // 2
            file.seek(middle)
            (byte,) = file.read(1)
            file.seek(middle)
            file.write(bytes([byte ^ 4]))
            file.flush()


def cut_in_place(path, record):
    os.truncate(path, record.bytes // 50)


def remove(path, record):
    path.unlink()


def damaging(damage, words):
    """Damage every train shard; the run must name one; restore them."""

    def fault(job, choose):
        whole = job.shards.with_name("whole")
        if not whole.exists():
            shutil.copytree(job.shards, whole)
        for record in read_manifest(whole).split("train"):
            damage(job.shards / record.file, record)
        assert job.ends() == 1
        line = job.last_line()
        assert line.startswith(f"error: {job.shards}/shard-0000"), line
        assert "row group" in line
        assert words in line
        for path in whole.glob("*.parquet"):
            shutil.copyfile(path, job.shards / path.name)

    return fault


ALL_FAULTS = {
    "SIGSTOP": stop_and_continue,
    "SIGTERM": terminate,
    "SIGKILL of the follower": kill_follower,
    "flipped bits": damaging(flip_bits, "its bytes are not those that were written"),
    "SIGKILL of the leader": kill_leader,
    "truncation": damaging(cut_in_place, "the file ends"),
    "SIGKILL of all": kill_all,
    "deletion": damaging(remove, "No such file or directory"),
}
DAMAGES = (flip_bits, cut_in_place, remove)


def damage_each_in_another_way(path, record):
    DAMAGES[int(path.stem[-1])](path, record)


SHORT_FAULTS = (  # SIGTERM, and SIGKILL of all or of any rank, are in test_resume.py
    stop_and_continue,
    kill_leader,
    damaging(damage_each_in_another_way, "cannot be read"),
)


@pytest.fixture
def shards(tiny_shards, tmp_path):
    return shutil.copytree(tiny_shards, tmp_path / "tiny")


@pytest.fixture
def start_job(training, shards):
    jobs = []

    def start(steps, **changes):
        jobs.append(Job(training, shards, steps, **changes))
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()


@pytest.fixture
def choose():
    seed = random.randrange(1 << 30)
    sys.stdout.write(f"seed of the moments: {seed}\n")  # shown when a test fails
    return random.Random(seed)


@pytest.fixture(scope="module")
def undisturbed():
    """Metrics of runs that nothing happens to, by their number of steps."""
    return {}


def compare(job, undisturbed):
    """The run must have seen what an undisturbed one sees, and left nothing in shared memory."""
    assert [path for path in job.shared_memory if Path(path).exists()] == []
    if job.steps not in undisturbed:
        settings = SETTINGS | {"max_steps": job.steps, "datasets__0__path": str(job.shards)}
        reference = job.training.run("reference", 2, **settings)
        undisturbed[job.steps] = exact_metrics(reference)
    assert exact_metrics(job.directory) == undisturbed[job.steps]


def test_faults_of_processes_and_files_once(start_job, choose, undisturbed):
    job = start_job(SHORT_STEPS)
    for number, fault in enumerate(SHORT_FAULTS):
        job.reach(3 * number + 1)
        fault(job, choose)
    job.finish()
    compare(job, undisturbed)


@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ALL_FAULTS)
def test_a_fault_twenty_times(start_job, choose, name, undisturbed):
    job = start_job(LONG_STEPS if "SIG" in name else DAMAGED_STEPS)
    for _ in range(20):
        job.reach(job.step() + choose.randrange(1, 3))
        time.sleep(choose.random() * 0.1)
        ALL_FAULTS[name](job, choose)
    job.finish()
    compare(job, undisturbed)


# --- a storage that fails ---


@pytest.fixture
def s3(shards, tmp_path, monkeypatch):
    """The shards as s3://bucket/tiny."""
    shutil.copytree(shards, tmp_path / "bucket" / "tiny")
    server = S3Server(tmp_path / "bucket")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system with room for some of the row groups."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def internal_error(server):
    server.faults = [("shard", 500, 2)]


def hang(server):
    server.faults = [("shard", "hang", 1)]


def cut_off(server):
    server.faults = [("shard", "cut", 2)]


STORAGE_FAULTS = {"500": internal_error, "hang": hang, "cut": cut_off, "restart": S3Server.stop}


def disturb(job, server, fault):
    """Let the storage fail until the run has met it; then it answers again."""
    met = job.retries()
    fault(server)
    deadline = time.monotonic() + 60
    while job.retries() == met:
        assert job.running(), f"ended without asking the storage: {job.tail()}"
        assert time.monotonic() < deadline, f"hangs: {job.tail()}"
        time.sleep(0.005)
    if fault is S3Server.stop:
        server.start()


def test_every_fault_of_a_storage_once_while_the_cache_is_full(
    start_job, s3, tiny_disk, undisturbed
):
    job = start_job(SHORT_STEPS, **ON_S3, loader__cache_dir=str(tiny_disk))
    for number, fault in enumerate(STORAGE_FAULTS.values()):
        job.reach(3 * number + 1)
        disturb(job, s3, fault)
    job.finish()
    assert job.log.read_text().count("cannot be written (No space left on device)") == 1
    compare(job, undisturbed)


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", STORAGE_FAULTS)
def test_a_fault_of_a_storage_twenty_times(start_job, s3, choose, name, undisturbed):
    job = start_job(DAMAGED_STEPS, **ON_S3)
    for _ in range(20):
        job.reach(job.step() + choose.randrange(1, 3))
        disturb(job, s3, STORAGE_FAULTS[name])
    job.finish()
    compare(job, undisturbed)


def test_a_storage_that_stays_away_ends_the_job_with_its_name(start_job, s3):
    job = start_job(SHORT_STEPS, **ON_S3, loader__read_attempts=2)
    job.reach(2)
    s3.faults = [("shard", "hang", 99)]
    assert job.ends() == 1
    assert job.last_line().startswith("error: s3://bucket/tiny: read shard-0000")
    assert "no answer within 2 s" in job.last_line()
