"""Several machines as one run: which ranks are here, and whether the others are still there.

A machine that dies says nothing: its connections stay open, and the ranks of the others would wait
for half an hour. So launchers beat: node 0 listens, the others connect, each sends a byte a second,
and whoever hears nothing for `SILENCE_SECONDS`, or of an end without farewell, gives its ranks up.
"""

import contextlib
import selectors
import socket
import threading
import time
from dataclasses import dataclass

from headrace.schemas.errors import ConfigError

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 30.0
JOIN_SECONDS = 300.0
BEAT, FAREWELL = b".", b"d"


@dataclass(frozen=True)
class Node:
    """One machine of a run."""

    number: int  # from 0
    count: int
    address: str  # of node 0
    port: int  # where ranks meet; launchers meet at the next one

    def environment(self, processes: int) -> dict[str, str]:
        """What the ranks of this machine are told, less their own numbers.

        Args:
            processes: on each machine.
        """
        return {
            "WORLD_SIZE": str(processes * self.count),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


class Heartbeat:
    """Knows when another machine is gone.

    Attributes:
        lost: what happened to which one; None while all is well.
    """

    def __init__(self, node: Node, silence_seconds: float = SILENCE_SECONDS) -> None:
        self.node = node
        self.silence_seconds = silence_seconds
        self.lost: str | None = None
        self._ended = threading.Event()
        self._peers: dict[socket.socket, str] = {}
        self._connect()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self, *, farewell: bool) -> None:
        """Stop.

        Args:
            farewell: all went well here; without it the others end too.
        """
        self._ended.set()
        self._thread.join()
        for peer in self._peers:
            if farewell:
                try_send(peer, FAREWELL)
            peer.close()

    def _connect(self) -> None:
        """Meet the others.

        Raises:
            ConfigError: they did not come.
        """
        node, end = self.node, time.monotonic() + JOIN_SECONDS
        if node.number:
            self._peers[reach(node, end)] = f"node 0 ({node.address})"
            return
        with socket.create_server(("", node.port + 1)) as server:
            while len(self._peers) < node.count - 1:
                server.settimeout(max(0.1, end - time.monotonic()))
                try:
                    peer, (address, *_) = server.accept()
                except TimeoutError:
                    raise ConfigError(
                        f"{node.count - 1 - len(self._peers)} of {node.count} nodes did not come "
                        f"to {node.address}:{node.port + 1} within {JOIN_SECONDS:.0f} s"
                    ) from None
                self._peers[peer] = f"a node ({address})"

    def _watch(self) -> None:
        heard = dict.fromkeys(self._peers, time.monotonic())
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                peer.setblocking(False)
                selector.register(peer, selectors.EVENT_READ, peer)
            beaten = 0.0
            while not self._ended.is_set() and self.lost is None and heard:
                now = time.monotonic()
                if now - beaten >= BEAT_SECONDS:
                    beaten = now
                    for peer in heard:
                        try_send(peer, BEAT)
                for key, _ in selector.select(timeout=0.2):
                    peer = key.data
                    said = try_receive(peer)
                    if said.endswith(FAREWELL):
                        selector.unregister(peer)
                        heard.pop(peer)
                    elif said:
                        heard[peer] = time.monotonic()
                    else:
                        self.lost = f"{self._peers[peer]} has ended"
                for peer, moment in heard.items():
                    if time.monotonic() - moment > self.silence_seconds:
                        seconds = f"{self.silence_seconds:.0f} s"
                        self.lost = f"{self._peers[peer]} has not answered for {seconds}"


def reach(node: Node, end: float) -> socket.socket:
    """A connection to node 0, which may start later than this one."""
    while True:
        try:
            return socket.create_connection((node.address, node.port + 1), timeout=5)
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"node 0 does not answer at {node.address}:{node.port + 1} ({error}); is it "
                    "started, with this --master-addr and --master-port?"
                ) from None
            time.sleep(0.5)


def try_send(peer: socket.socket, message: bytes) -> None:
    """Send, or let silence tell that it did not arrive."""
    with contextlib.suppress(OSError):
        peer.send(message)


def try_receive(peer: socket.socket) -> bytes:
    """What came; nothing at the end of the connection."""
    try:
        return peer.recv(4096)
    except BlockingIOError:
        return BEAT
    except OSError:
        return b""
