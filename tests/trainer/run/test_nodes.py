"""One run on two machines, here network namespaces; a machine that goes ends it, with its name."""

import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest
from ports import free_port
from runs import as_toml, children, exact_metrics, start

from headrace.jobs.commands import nodes as nodes_module
from headrace.jobs.commands.nodes import Nodes, NodeWatch
from headrace.schemas.checkpoint_names import checkpoint_name
from headrace.schemas.errors import ConfigError
from headrace.schemas.train.run_state import read_run_state

LONGEST_END = 90  # seconds until every process of a run is gone
STEPS = 8


@pytest.fixture
def hosts():
    """Two hosts with a cable between them: names of namespaces, 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    tag = uuid.uuid4().hex[:6]
    names = [f"hr{tag}{end}" for end in "ab"]
    steps = [f"netns add {name}" for name in names]
    steps.append(f"link add {names[0]} type veth peer name {names[1]}")
    for number, name in enumerate(names, 1):
        steps += [
            f"link set {name} netns {name}",
            f"-n {name} addr add 10.77.0.{number}/24 dev {name}",
            f"-n {name} link set {name} up",
            f"-n {name} link set lo up",
        ]
    try:
        for step in steps:
            done = subprocess.run(["ip", *step.split()], capture_output=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces are not allowed here: ip {step}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class Cluster:
    """A run of a stage on each of two hosts."""

    def __init__(self, training, hosts):
        self.training = training
        self.hosts = hosts
        self.disks = [training.directory / "disk-a", training.directory / "disk-b"]
        self.directory = self.disks[0]
        self.launchers = []

    def start(self, *options, **settings):
        sets = {
            "pipeline_stages": 2,
            "max_steps": STEPS,
            "checkpoint__every_steps": 1,
            **settings,
        }
        options = [*options]
        for key, value in sets.items():
            options += ["--set", as_toml(key, value)]
        self.launchers = []
        for number, (host, disk) in enumerate(zip(self.hosts, self.disks, strict=True)):
            place = ["--nodes", "2", "--node-rank", str(number), "--master", "10.77.0.1"]
            place += ["--node-timeout", "5", "--set", as_toml("output_dir", str(disk))]
            command = self.training.command(1, *place, *options)
            self.launchers.append(start(command, self.training.directory / f"{host}.log", host))

    def step(self):
        path = self.directory / "metrics.jsonl"
        return path.read_text().count('"kind": "train"') if path.exists() else 0

    def reach(self, step):
        deadline = time.monotonic() + 120
        while self.step() < step:
            assert all(launcher.poll() is None for launcher in self.launchers), self.tail(0)
            assert time.monotonic() < deadline, self.tail(0)
            time.sleep(0.02)

    def ends(self, number, longest=LONGEST_END):
        """The exit code of a host's launcher; none of its ranks is left."""
        launcher = self.launchers[number]
        ranks = children(launcher)
        code = launcher.wait(timeout=longest)
        assert psutil.wait_procs(ranks, timeout=60)[1] == []
        return code

    def tail(self, number):
        return (self.training.directory / f"{self.hosts[number]}.log").read_text()[-1500:]

    def kill(self, number):
        """The host dies: all its processes are gone without a word."""
        launcher = psutil.Process(self.launchers[number].pid)
        for process in (launcher, *launcher.children(recursive=True)):
            process.kill()
        self.launchers[number].wait()


@pytest.fixture
def cluster(training, hosts):
    cluster = Cluster(training, hosts)
    yield cluster
    for launcher in cluster.launchers:
        if launcher.poll() is None:
            launcher.kill()
            launcher.wait()


@pytest.mark.slow
def test_a_run_goes_on_after_one_of_two_hosts_with_disks_of_their_own_died(cluster, training):
    alone = training.run("alone", 2, pipeline_stages=2, max_steps=STEPS)
    cluster.start(checkpoint__node_local=True)
    cluster.reach(3)
    cluster.kill(1)
    assert cluster.ends(0) == 1
    assert cluster.tail(0).splitlines()[-1] == (
        "error: node 1 (10.77.0.2) is gone: its launcher has ended; "
        "start all nodes again with --resume"
    )
    cluster.start("--resume", checkpoint__node_local=True)
    assert [cluster.ends(number, 150) for number in (0, 1)] == [0, 0], cluster.tail(0)
    assert exact_metrics(cluster.directory) == exact_metrics(alone)
    adapter = "adapter/adapter_model.safetensors"
    assert (cluster.disks[0] / adapter).read_bytes() == (alone / adapter).read_bytes()
    assert not (cluster.disks[1] / "adapter").exists()
    for number, disk in enumerate(cluster.disks):
        last = disk / "checkpoints" / checkpoint_name(STEPS)
        assert [path.name for path in last.glob("stage-*")] == [f"stage-{number:02d}.safetensors"]
        assert read_run_state(last).step == STEPS


@pytest.mark.exhaustive
def test_a_cut_cable_ends_both_hosts(cluster, hosts):
    cluster.start(max_steps=500)
    cluster.reach(3)
    subprocess.run(["ip", "-n", hosts[1], "link", "set", hosts[1], "down"], check=True)
    assert [cluster.ends(number) for number in (0, 1)] == [1, 1]
    for number, other in ((0, "node 1 (10.77.0.2)"), (1, "node 0 (10.77.0.1)")):
        assert f"{other} is gone: nothing heard for 5 s" in cluster.tail(number).splitlines()[-1]


@pytest.mark.exhaustive
def test_a_stop_on_one_host_saves_on_a_disk_that_both_share(cluster):
    cluster.disks = [cluster.directory] * 2
    cluster.start(max_steps=500, checkpoint__every_steps=400)
    cluster.reach(3)
    psutil.Process(cluster.launchers[1].pid).send_signal(signal.SIGTERM)
    assert [cluster.ends(number) for number in (0, 1)] == [0, 0], cluster.tail(1)
    (saved,) = (cluster.directory / "checkpoints").glob("step-*")
    assert len(list(saved.glob("stage-*"))) == 2


# --- the watch by itself, on the loopback interface ---


def meeting(count, **settings):
    """The watches of so many nodes; node 0 listens beside a free port, so that may be taken."""
    for _ in range(100):
        port = free_port()
        nodes = [Nodes(count, rank, "127.0.0.1", port, 60, **settings) for rank in range(count)]
        with suppress(ConfigError):
            return [NodeWatch(node) for node in nodes]
    raise AssertionError("no two ports side by side are free")


@pytest.fixture
def watches():
    """Those of three nodes; each is polled by hand."""
    made = meeting(3, beat_seconds=0.01)
    deadline = time.monotonic() + 120
    while {peer.node for peer in made[0].peers} != {1, 2}:
        assert [watch.poll() for watch in made] == [None] * 3
        assert time.monotonic() < deadline
    yield made
    for watch in made:
        watch.close()


def problems(watches, *numbers):
    """What these nodes notice, each polled until it notices something."""
    found, deadline = {}, time.monotonic() + 120
    while len(found) < len(numbers):
        for number in numbers:
            problem = watches[number].poll()
            if problem and number not in found:
                found[number] = problem
        assert time.monotonic() < deadline, found
    return [found[number] for number in numbers]


def test_a_failure_is_told_to_all_nodes(watches):
    watches[1].fail("rank 5 ended with code 7")
    told = "rank 5 ended with code 7 on node 1; start all nodes again with --resume"
    assert problems(watches, 0, 2) == [told] * 2


def test_silence_is_noticed_by_all_nodes(watches):
    assert watches[0].poll() is None  # what node 1 had said before
    (silent,) = (peer for peer in watches[0].peers if peer.node == 1)
    silent.heard -= 60
    told = "node 1 (127.0.0.1) is gone: nothing heard for 60 s; start all nodes again with --resume"
    assert problems(watches, 0, 2) == [told] * 2


def test_nodes_that_are_done_may_go(watches):
    watches[1].finish()
    watches[1].close()
    watches[0].finish()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        assert [watches[number].poll() for number in (0, 2)] == [None] * 2


def test_nodes_that_never_come_are_named():
    late, *_ = meeting(3, join_seconds=0.0)
    assert late.poll() == (
        "node 1, 2 did not join within 0 s, or has another config, other shards or another "
        "HEADRACE_SECRET; start all nodes again with --resume"
    )
    late.close()


@pytest.fixture
def joining():
    """Nodes 0 and 1 of two, and a way to connect to node 0 as a stranger."""
    pair = meeting(2, secret="ours")
    port = pair[0].nodes.port + 1
    strangers = []

    def connect(text=b"", at=port):
        strangers.append(socket.create_connection(("127.0.0.1", at)))
        strangers[-1].sendall(text)
        return strangers[-1]

    yield pair, connect
    for end in (*pair, *strangers):
        end.close()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"failed all is lost\n",
        b"hello 1\ndone\n",
        b"hello 1 " + b"0" * 64 + b"\nfailed all is lost\n",
        b"nonce x\nhello 0 y\nalive\n",
        b"\x00\xff" * 9000,
    ],
    ids=["silent", "failed", "done", "guess", "node 0", "noise"],
)
@pytest.mark.parametrize("closes", [False, True], ids=["stays", "goes"])
def test_a_stranger_is_ignored_and_the_node_joins(joining, text, closes):
    (first, second), connect = joining
    stranger = connect(text)
    if closes:
        stranger.close()
    deadline = time.monotonic() + 120
    while not (first.peers and second.peers):
        assert (first.poll(), second.poll()) == (None, None)
        assert time.monotonic() < deadline
    assert [peer.node for peer in first.peers] == [1]
    second.fail("rank 3 failed with code 1: \x1b[2J")
    assert problems([first], 0) == [
        "rank 3 failed with code 1: ?[2J on node 1; start all nodes again with --resume"
    ]


def test_a_node_that_does_not_know_the_secret_is_ignored_and_named(joining, caplog):
    (first, second), _ = joining
    second.nodes = replace(second.nodes, secret="theirs")
    deadline = time.monotonic() + 120
    while "says that it is node 1" not in caplog.text:
        assert (first.poll(), second.poll()) == (None, None)
        assert time.monotonic() < deadline
    assert first.peers == []


def test_many_strangers_are_not_all_listened_to(joining):
    (first, _), connect = joining
    for _ in range(100):
        connect()
        assert first.poll() is None
    assert len(first.strangers) == nodes_module.MOST_STRANGERS


def test_the_launchers_meet_on_the_interface_of_the_run_alone(joining):
    (first, _), _ = joining
    assert first.server.getsockname()[0] == "127.0.0.1"


def test_a_name_of_node_0_that_only_it_can_reach_is_refused():
    with pytest.raises(ConfigError, match=r"--master box: means 127\.0\.1\.1 here"):
        Nodes(2, 0, "box", 29500, 60).address(lambda master, port: "127.0.1.1")


def test_a_place_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="--node-rank 2: with --nodes 2 it is 0 to 1"):
        Nodes(2, 2, "host", 29500, 60)
