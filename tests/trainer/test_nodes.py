"""Several machines: each knows when another is gone, and a run goes on where it was."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from runs import as_toml, checkpoint_tensors, exact_metrics

from headrace.jobs.launch import NODE_LOST, free_port
from headrace.jobs.nodes import Heartbeat, Node
from headrace.jobs.train_commands import count_processes, find_node
from headrace.schemas.errors import ConfigError


def port_pair():
    """A free port whose next one is free as well."""
    while True:
        port = free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@contextmanager
def two_nodes(silence_seconds=60.0):
    port, made = port_pair(), {}

    def start(number):
        made[number] = Heartbeat(Node(number, 2, "127.0.0.1", port), silence_seconds)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        yield made[0], made[1]
    finally:
        for node in made.values():
            node.close(farewell=True)


def wait_until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to that within a minute")


@pytest.mark.parametrize("leaving", [0, 1])
def test_a_node_that_ends_without_farewell_is_lost_to_the_other(leaving):
    with two_nodes() as nodes:
        nodes[leaving].close(farewell=False)
        other = nodes[1 - leaving]
        wait_until(lambda: other.lost)
        assert other.lost.endswith("has ended")


def test_a_farewell_is_no_loss():
    with two_nodes() as (one, other):
        one.close(farewell=True)
        wait_until(lambda: not other._thread.is_alive())
        assert other.lost is None


def test_silence_is_a_loss(monkeypatch):
    with two_nodes(silence_seconds=1.5) as (one, other):
        monkeypatch.setattr("headrace.jobs.nodes.try_send", lambda peer, message: None)
        wait_until(lambda: one.lost and other.lost)
        assert other.lost == "node 0 (127.0.0.1) has not answered for 2 s"


def test_ranks_are_counted_over_all_nodes():
    node = Node(1, 2, "10.0.0.1", 29500)
    assert node.environment(4)["WORLD_SIZE"] == "8"
    assert count_processes(2, 4, nodes=2) == 2
    with pytest.raises(ConfigError, match="does not divide the 6 processes of 2 nodes"):
        count_processes(3, 4, nodes=2)
    assert find_node(1, 0, None, None) is None
    with pytest.raises(ConfigError, match="needs --master-addr and --master-port"):
        find_node(2, 0, None, None)
    with pytest.raises(ConfigError, match="2 nodes have numbers up to 1"):
        find_node(2, 2, "10.0.0.1", 29500)


class Hosts:
    """Two network namespaces with one cable between them."""

    def __init__(self):
        self.names = [f"hr{os.getpid()}{side}" for side in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def __enter__(self):
        one, other = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", one, "netns", one, "type", "veth", "peer", "name", other, "netns", other)
        for name, address in zip(self.names, self.addresses, strict=True):
            inside(name, "ip", "addr", "add", f"{address}/24", "dev", name)
            inside(name, "ip", "link", "set", "lo", "up")
            inside(name, "ip", "link", "set", name, "up")
        return self

    def __exit__(self, *_):
        for name in self.names:
            ip("netns", "del", name)

    def start(self, number, port, config, *arguments):
        name = self.names[number]
        return subprocess.Popen(
            [
                *("ip", "netns", "exec", name, sys.executable, "-m", "headrace.jobs.cli"),
                *("train", str(config), "--gpus", "1", "--nodes", "2"),
                *("--node-rank", str(number), "--master-addr", self.addresses[0]),
                *("--master-port", str(port), *arguments),
            ],
            env={**os.environ, "GLOO_SOCKET_IFNAME": name},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def inside(name, *command):
    subprocess.run(["ip", "netns", "exec", name, *command], check=True, capture_output=True)


def may_make_namespaces():
    if shutil.which("ip") is None:
        return False
    name = f"hr{os.getpid()}t"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode == 0:
        ip("netns", "del", name)
    return made.returncode == 0


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_two_hosts_train_one_dies_and_the_run_goes_on_to_the_bit(training):
    if not may_make_namespaces():
        pytest.skip("network namespaces need root")
    settings = {"pipeline_stages": 2, "max_steps": 200, "checkpoint__every_steps": 5}
    settings |= {"evaluation__before_first_step": False, "evaluation__after_last_step": False}
    expected = training.run("one-host", 2, **settings)
    run = training.directory / "two-hosts"
    sets = {"output_dir": str(run), **settings}
    options = [part for key, value in sets.items() for part in ("--set", as_toml(key, value))]
    with Hosts() as hosts:
        nodes = [hosts.start(n, 29511, training.config, *options) for n in range(2)]
        wait_until(lambda: list((run / "checkpoints").glob("step-*")))
        inside(hosts.names[1], "ip", "link", "set", hosts.names[1], "down")
        said = [node.communicate(timeout=180)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [NODE_LOST, NODE_LOST], said
        assert "a node (10.77.0.2) has not answered for 30 s" in said[0]
        assert "continue on all nodes with --resume" in said[1]
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] < 200

        inside(hosts.names[1], "ip", "link", "set", hosts.names[1], "up")
        nodes = [hosts.start(n, 29521, training.config, *options, "--resume") for n in range(2)]
        said = [node.communicate(timeout=300)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said
    assert exact_metrics(run) == exact_metrics(expected)
    tensors, found = checkpoint_tensors(expected), checkpoint_tensors(run)
    assert found.keys() == tensors.keys()
    assert all(found[name].equal(tensors[name]) for name in tensors)
