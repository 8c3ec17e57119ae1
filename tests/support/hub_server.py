"""A hub on loopback, as far as uploads of small files need one."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Keeps repositories, branches, and the files of commits.

    Attributes:
        repositories: name to whether it is private.
        files: (repository, revision) to the content of each file.
        refuses: answer uploads with 403.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.files, self.branches, self.messages = {}, {}, [], []
        self.refuses = False
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.partition("?")[0].strip("/").split("/")
        hub = self.server
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            private = asked.get("private", asked.get("visibility") == "private")
            hub.repositories.setdefault(name, private)
            return self.answer({"url": f"{hub.url}/{name}", "name": name, "id": "1"})
        if parts == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        if hub.refuses:
            return self.answer({"error": "you may not write here"}, 403)
        name, action, revision = "/".join(parts[2:4]), parts[4], parts[-1]
        if action == "branch":
            hub.branches.append((name, revision))
            return self.answer({})
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        assert action == "commit", self.path
        kept = hub.files.setdefault((name, revision), {})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                hub.messages.append(line["value"]["summary"])
            elif line["key"] == "file":
                kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{hub.url}/{name}/commit/1"
        return self.answer({"success": True, "commitOid": "1", "commitUrl": url})

    def do_GET(self):
        self.answer({"sha": "0", "id": "1", "siblings": []})

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
