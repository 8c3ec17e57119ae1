"""Several machines in one run: where this one stands, and a watch over the others.

Each machine runs a launcher of its own. They keep a connection to the first one's, on which each
says every second that it lives, and tells why when it does not.
"""

import socket
import time
from dataclasses import dataclass, field

from headrace.schemas.errors import ConfigError

JOIN_SECONDS = 600.0  # for all launchers to be started
BEAT_SECONDS = 1.0
ALIVE, DONE, FAILED, HELLO = "alive", "done", "failed", "hello"
RESTART = "start all nodes again with --resume"


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, and which of them this is."""

    count: int
    rank: int
    master: str  # host name or address of node 0
    port: int  # where the ranks meet; the launchers meet on the next one
    timeout: float  # seconds of silence after which a node is given up

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise ConfigError(
                f"--node-rank {self.rank}: with --nodes {self.count} it is 0 to {self.count - 1}"
            )

    def interface(self) -> str:
        """The network interface over which this machine reaches node 0.

        Raises:
            ConfigError: it does not.
        """
        import psutil

        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((self.master, self.port))
                mine = probe.getsockname()[0]
        except OSError as error:
            raise ConfigError(f"--master {self.master}: cannot be reached ({error})") from None
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == mine for address in addresses):
                return name
        raise ConfigError(f"--master {self.master}: no network interface has the address {mine}")


@dataclass
class Peer:
    """The launcher of another node."""

    connection: socket.socket
    address: str
    heard: float
    node: int | None = None  # until it says which
    done: bool = False
    unread: bytearray = field(default_factory=bytearray)

    @property
    def name(self) -> str:
        """Return the name of the node for messages."""
        return f"node {self.node} ({self.address})"


class NodeWatch:
    """Notices the end of other nodes; `poll` it several times a second."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.peers: list[Peer] = []
        self.started = self.last_beat = time.monotonic()
        self.server: socket.socket | None = None
        if nodes.rank == 0:
            self.server = socket.create_server(("", nodes.port + 1))
            self.server.setblocking(False)

    def poll(self) -> str | None:
        """Listen and speak; what is wrong with another node, if anything is."""
        now = time.monotonic()
        self._meet(now)
        problem = self._missing(now)
        for peer in self.peers:
            problem = problem or self._listen(peer, now)
        if now - self.last_beat > BEAT_SECONDS:
            self.last_beat = now
            self._tell(ALIVE)
        if problem and self.nodes.rank == 0:
            self._tell(f"{FAILED} {problem}")
        return problem

    def fail(self, reason: str) -> None:
        """Tell the others why this node ends; node 0 passes it on."""
        self._tell(f"{FAILED} {reason} on node {self.nodes.rank}; {RESTART}")

    def finish(self) -> None:
        """Tell the others that this node's ranks have done their work."""
        self._tell(DONE)

    def close(self) -> None:
        """End all connections."""
        for peer in self.peers:
            peer.connection.close()
        if self.server is not None:
            self.server.close()

    def _meet(self, now: float) -> None:
        if len(self.peers) == (self.nodes.count - 1 if self.server else 1):
            return
        try:
            if self.server is not None:
                connection, (address, *_) = self.server.accept()
            else:
                address = self.nodes.master
                connection = socket.create_connection((address, self.nodes.port + 1), timeout=1)
        except OSError:
            return  # nobody there yet
        connection.setblocking(False)
        self.peers.append(Peer(connection, address, now, node=None if self.server else 0))
        self._tell(f"{HELLO} {self.nodes.rank}")

    def _missing(self, now: float) -> str | None:
        """Return the message that names absent nodes once the time for joining is over."""
        if now - self.started < JOIN_SECONDS:
            return None
        wanted = set(range(1, self.nodes.count)) if self.server else {0}
        absent = sorted(wanted - {peer.node for peer in self.peers if peer.node is not None})
        if not absent:
            return None
        names = ", ".join(map(str, absent))
        return f"node {names} did not join within {JOIN_SECONDS:.0f} s; {RESTART}"

    def _listen(self, peer: Peer, now: float) -> str | None:
        try:
            while received := peer.connection.recv(1 << 12):
                peer.unread += received
            ended = True
        except BlockingIOError:
            ended = False
        except OSError:
            ended = True
        *lines, rest = bytes(peer.unread).split(b"\n")
        peer.unread = bytearray(rest)
        for line in lines:
            peer.heard = now
            word, _, text = line.decode(errors="replace").partition(" ")
            if word == FAILED:
                return text
            if word == HELLO and text.isdecimal():
                peer.node = int(text)
            peer.done |= word == DONE
        if peer.done:
            return None
        if ended:
            return f"{peer.name} is gone: its launcher has ended; {RESTART}"
        if now - peer.heard > self.nodes.timeout:
            return f"{peer.name} is gone: nothing heard for {self.nodes.timeout:.0f} s; {RESTART}"
        return None

    def _tell(self, line: str) -> None:
        for peer in self.peers:
            try:
                peer.connection.send(line.encode() + b"\n")
            except OSError:
                continue  # listening will tell
