"""A small Google Cloud Storage server over a folder: what Arrow's client asks for."""

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from s3_server import BUCKET, Handler, S3Server

OBJECTS = f"/storage/v1/b/{BUCKET}/o"


class GcsHandler(Handler):
    """Objects with their metadata as JSON, and their bytes by range."""

    prefix = f"{OBJECTS}/"

    def answer_get(self):
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        path = self.server.owner.folder / unquote(url.path.removeprefix(self.prefix))
        if url.path == OBJECTS:
            self.answer_json(self.listing(query.get("prefix", [""])[0]))
        elif "media" in query.get("alt", []):
            self.answer_object(with_body=True)
        else:
            self.answer_json(self.describe(path) if path.is_file() else None)

    def answer_json(self, value):
        if not self.fault():
            self.send(200 if value else 404, json.dumps(value or {"error": {"code": 404}}).encode())

    def listing(self, prefix):
        folder = self.server.owner.folder
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        items = [self.describe(path) for path in paths]
        return {"items": [item for item in items if item["name"].startswith(prefix)]}

    def describe(self, path):
        name = path.relative_to(self.server.owner.folder).as_posix()
        return {
            "bucket": BUCKET,
            "name": name,
            "size": str(path.stat().st_size),
            "generation": "1",
            "timeCreated": "2026-11-21T00:00:00.000Z",
        }


class GcsServer(S3Server):
    """Serves `folder` as one bucket."""

    handler = GcsHandler


@contextmanager
def serving_google(folder):
    """Such a server as a process of its own; gives its host and port.

    Arrow waits for the size of an object with Python's lock held, so that nothing in this process
    could answer.
    """
    command = [sys.executable, __file__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


if __name__ == "__main__":
    server = GcsServer(Path(sys.argv[1]))
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    threading.Event().wait()
