"""Several machines in one run: where this one stands, and a watch over the others.

Each machine runs a launcher of its own. They keep a connection to the first one's, on which each
says every second that it lives, and tells why when it does not. Both ends prove first that they
know the secret of the run; whoever does not is a stranger, and is not heard.
"""

import hmac
import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from headrace.schemas.errors import ConfigError

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 60.0  # of silence, after which a node is given up, unless asked otherwise
JOIN_SECONDS = 600.0
BEAT_SECONDS = 1.0
ALIVE, DONE, FAILED, HELLO, NONCE = "alive", "done", "failed", "hello", "nonce"
MOST_STRANGERS = 64  # that are listened to at once
STRANGER_SECONDS = 10.0  # to say who one is
LONGEST_LINE = 1 << 12
SECRET_VARIABLE = "HEADRACE_SECRET"
RESTART = "start all nodes again with --resume"


def own_address(host: str, port: int) -> str:
    """Return the address that this machine has for another one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, and which of them this is."""

    count: int
    rank: int
    master: str  # host name or address of node 0
    port: int  # where the ranks meet; the launchers meet on the next one
    timeout: float  # seconds of silence after which a node is given up
    secret: str = ""  # that all launchers of the run know
    join_seconds: float = JOIN_SECONDS  # for all launchers to be started
    beat_seconds: float = BEAT_SECONDS

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise ConfigError(
                f"--node-rank {self.rank}: with --nodes {self.count} it is 0 to {self.count - 1}"
            )

    def address(self, towards: Callable[[str, int], str] = own_address) -> str:
        """Return this machine's address towards node 0, or on node 0 the one that others reach.

        Args:
            towards: returns the address of this machine for a host and a port of it.

        Raises:
            ConfigError: node 0 cannot be reached, or not from other machines.
        """
        try:
            mine = towards(self.master, self.port)
        except OSError as error:
            raise ConfigError(f"--master {self.master}: cannot be reached ({error})") from None
        named = self.master == "localhost" or self.master.startswith("127.")
        if mine.startswith("127.") and not named and self.rank == 0:
            raise ConfigError(
                f"--master {self.master}: means {mine} here, which no other machine reaches; give "
                "the address of node 0 in the network of the run"
            )
        return mine

    def interface(self) -> str:
        """Return the network interface over which this machine reaches node 0.

        Raises:
            ConfigError: it does not.
        """
        import psutil

        mine = self.address()
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == mine for address in addresses):
                return name
        raise ConfigError(f"--master {self.master}: no network interface has the address {mine}")

    def proof(self, nonce: str, rank: int | str) -> str:
        """Return what shows, to who gave the nonce, that a node knows the secret."""
        text = f"headrace {nonce} {rank}".encode()
        return hmac.digest(self.secret.encode(), text, "sha256").hex()


@dataclass
class Peer:
    """The other end of a connection: a stranger, until it has proved to be another node.

    Attributes:
        nonce: what we gave it to answer.
        node: which of them it is; None of a stranger.
    """

    connection: socket.socket
    address: str
    heard: float
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    node: int | None = None
    done: bool = False
    ended: bool = False
    unread: bytes = b""
    said: list[str] = field(default_factory=list)  # lines that were not acted on yet

    @property
    def name(self) -> str:
        """Return the name of the node for messages."""
        return f"node {self.node} ({self.address})"

    def tell(self, line: str) -> None:
        """Send a line, if it can be sent."""
        with suppress(OSError):  # listening will tell
            self.connection.send(line.encode() + b"\n")

    def lines(self) -> Iterator[str]:
        """Yield the lines that have come, each once; notes the end of the connection."""
        try:
            while received := self.connection.recv(LONGEST_LINE):
                self.unread += received
                if len(self.unread) > LONGEST_LINE and self.node is None:
                    break
            self.ended = True
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        *lines, self.unread = self.unread.split(b"\n")
        self.unread = self.unread[-LONGEST_LINE:]
        self.said += [printable(line.decode(errors="replace")) for line in lines]
        while self.said:
            yield self.said.pop(0)


def printable(text: str) -> str:
    """Return a text without what a terminal would act on."""
    return "".join(c if c.isprintable() else "?" for c in text[:LONGEST_LINE])


class NodeWatch:
    """Notices the end of other nodes; `poll` it several times a second.

    Raises:
        ConfigError: the port beside the ranks' is in use.
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.strangers: list[Peer] = []
        self.peers: list[Peer] = []
        self.started = self.last_beat = time.monotonic()
        self.server: socket.socket | None = None
        if nodes.rank == 0:
            place = (nodes.address(), nodes.port + 1)
            try:
                self.server = socket.create_server(place)
            except OSError as error:
                raise ConfigError(
                    f"--master-port {nodes.port}: {error.strerror} on the next one, "
                    f"{place[1]}, where the launchers meet; give another one"
                ) from None
            self.server.setblocking(False)

    def poll(self) -> str | None:
        """Listen and speak; return what is wrong with another node, if anything is."""
        now = time.monotonic()
        self._meet(now)
        for stranger in list(self.strangers):
            self._get_to_know(stranger, now)
        problem = self._missing(now)
        for peer in self.peers:
            problem = problem or self._listen(peer, now)
        if now - self.last_beat > self.nodes.beat_seconds:
            self.last_beat = now
            self._tell(ALIVE)
        if problem and self.nodes.rank == 0:
            self._tell(f"{FAILED} {problem}")
        return problem

    def fail(self, reason: str) -> None:
        """Tell the others why this node ends; node 0 passes it on."""
        self._tell(f"{FAILED} {printable(reason)} on node {self.nodes.rank}; {RESTART}")

    def finish(self) -> None:
        """Tell the others that this node's ranks have done their work."""
        self._tell(DONE)

    def close(self) -> None:
        """End all connections."""
        for peer in (*self.peers, *self.strangers):
            peer.connection.close()
        if self.server is not None:
            self.server.close()

    def _meet(self, now: float) -> None:
        """Take a new connection in, or make the one to node 0; its end begins with a nonce."""
        if self.server is None and (self.peers or self.strangers):
            return
        if len(self.strangers) >= MOST_STRANGERS:
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
        self.strangers.append(Peer(connection, address, now))
        self.strangers[-1].tell(f"{NONCE} {self.strangers[-1].nonce}")

    def _get_to_know(self, stranger: Peer, now: float) -> None:
        """Answer its nonce, and check its answer to ours; then it is a peer. Else let it go."""
        for line in stranger.lines():
            word, _, text = line.partition(" ")
            rank, _, proof = text.partition(" ")
            if word == NONCE:
                answer = self.nodes.proof(text, self.nodes.rank)
                stranger.tell(f"{HELLO} {self.nodes.rank} {answer}")
            elif word == HELLO and self._is_node(stranger, rank, proof):
                stranger.node, stranger.heard = int(rank), now
            if stranger.node is not None:
                break
        if stranger.node is not None:
            self.strangers.remove(stranger)
            self.peers.append(stranger)
        elif stranger.ended or now - stranger.heard > STRANGER_SECONDS:
            self.strangers.remove(stranger)
            stranger.connection.close()

    def _is_node(self, stranger: Peer, rank: str, proof: str) -> bool:
        """Return whether it is a node that is missed here, and knows the secret."""
        missed = {str(node) for node in self._wanted() - {peer.node for peer in self.peers}}
        right = self.nodes.proof(stranger.nonce, rank)
        if rank in missed and hmac.compare_digest(right.encode(), proof.encode()):
            return True
        logger.warning(
            "%s says that it is node %s, and has another config, other shards or another %s; "
            "ignored",
            stranger.address,
            rank,
            SECRET_VARIABLE,
        )
        stranger.ended = True
        return False

    def _wanted(self) -> set[int | None]:
        """Return the nodes that this one is to be connected to."""
        return set(range(1, self.nodes.count)) if self.server else {0}

    def _missing(self, now: float) -> str | None:
        """Return the message that names absent nodes once the time for joining is over."""
        if now - self.started < self.nodes.join_seconds:
            return None
        absent = sorted(map(str, self._wanted() - {peer.node for peer in self.peers}))
        if not absent:
            return None
        names = ", ".join(absent)
        return (
            f"node {names} did not join within {self.nodes.join_seconds:.0f} s, or has another "
            f"config, other shards or another {SECRET_VARIABLE}; {RESTART}"
        )

    def _listen(self, peer: Peer, now: float) -> str | None:
        """Return what is wrong with a node."""
        for line in peer.lines():
            peer.heard = now
            word, _, text = line.partition(" ")
            if word == FAILED:
                return text
            peer.done |= word == DONE
        if peer.done:
            return None
        if peer.ended:
            return f"{peer.name} is gone: its launcher has ended; {RESTART}"
        if now - peer.heard > self.nodes.timeout:
            return f"{peer.name} is gone: nothing heard for {self.nodes.timeout:.0f} s; {RESTART}"
        return None

    def _tell(self, line: str) -> None:
        for peer in self.peers:
            peer.tell(line)
