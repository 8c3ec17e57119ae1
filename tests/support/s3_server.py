"""A small S3 server over a folder: what Arrow's client asks for, and faults on demand."""

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"
ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
CODES = {500: "InternalError", 403: "AccessDenied"}


class Server(ThreadingHTTPServer):
    """One whose stop also cuts the connections that clients keep open."""

    daemon_threads = True

    def __init__(self, address, owner):
        super().__init__(address, owner.handler)
        self.owner = owner
        self.connections = []

    def process_request(self, request, client_address):
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        """A client that went away, or a stop."""

    def cut(self):
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    prefix = f"/{BUCKET}/"  # of the paths of objects

    def log_message(self, *arguments):
        """Quiet."""

    def do_HEAD(self):
        self.answer_object(with_body=False)

    def do_GET(self):
        self.answer_get()

    def answer_get(self):
        if "list-type" in parse_qs(urlsplit(self.path).query):
            self.answer_listing()
        else:
            self.answer_object(with_body=True)

    def fault(self):
        """Act out the fault that is due; whether there was one."""
        owner = self.server.owner
        asked = f"{self.command} {unquote(urlsplit(self.path).path)}"
        owner.requests.append(f"{asked} {self.headers.get('Range', '')}".strip())
        fault = owner.next_fault(asked)
        if fault == "hang":
            owner.released.wait(60)
            self.close_connection = True
        elif fault == "cut":
            self.send_response(206)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"cut")
            self.close_connection = True
        elif fault is not None:
            self.send(fault, ERROR.format(code=CODES[fault]).encode())
        return fault is not None

    def answer_object(self, with_body):
        if self.fault():
            return
        key = unquote(urlsplit(self.path).path).removeprefix(self.prefix)
        path = self.server.owner.folder / key
        if not path.is_file():
            self.send(404, ERROR.format(code="NoSuchKey").encode() if with_body else b"")
            return
        content = path.read_bytes()
        wished = self.headers.get("Range")
        if wished:
            first, last = wished.removeprefix("bytes=").split("-")
            first, last = int(first), int(last or len(content) - 1)
            part = content[first : last + 1]
            extra = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"}
            self.send(206, part, extra)
        else:
            self.send(200, content, with_body=with_body)

    def answer_listing(self):
        if self.fault():
            return
        prefix = parse_qs(urlsplit(self.path).query).get("prefix", [""])[0]
        folder = self.server.owner.folder
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size></Contents>"
            for path in sorted(folder.rglob("*"))
            if path.is_file() and (key := path.relative_to(folder).as_posix()).startswith(prefix)
        )
        self.send(
            200,
            f'<?xml version="1.0"?><ListBucketResult><Name>{BUCKET}</Name>'
            f"<IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode(),
        )

    def send(self, status, content, extra=(), with_body=True):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
        for name, value in dict(extra).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(content)


class S3Server:
    """Serves `folder` as one bucket on a port of its own, kept over restarts.

    Attributes:
        handler: who answers.
        faults: (text in "GET /bucket/key", fault, times) in the order in which they are tried;
            a fault is "hang", "cut" or a status.
        requests: "GET /bucket/key bytes=0-9", in order.
    """

    handler = Handler

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.faults = []
        self.requests = []
        self.released = threading.Event()
        self.lock = threading.Lock()
        self.start()

    def next_fault(self, asked):
        with self.lock:
            for index, (text, fault, times) in enumerate(self.faults):
                if text in asked and times:
                    self.faults[index] = (text, fault, times - 1)
                    return fault
        return None

    @property
    def environment(self):
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self):
        self.server = Server(("127.0.0.1", self.port), self)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.server.cut()

    def close(self):
        self.released.set()
        self.stop()
