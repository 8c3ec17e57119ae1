"""Inputs behind URLs give the rows of the same files on the disk, and are read by range."""

import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath

import fsspec
import fsspec.implementations.memory
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.dataprep.input import remote
from headrace.dataprep.input.remote import fits, list_remote
from headrace.schemas.errors import DataError, HeadraceError

TEXTS = [f"stone {number} " * 40 for number in range(300)]


class Handler(BaseHTTPRequestHandler):
    """Files of a folder by range, after as many failures as the server still has to give."""

    def do_GET(self):
        server, path = self.server, self.server.folder / self.path.partition("?")[0][1:]
        server.asked.append(self.headers.get("Range"))
        if server.failures:
            server.failures -= 1
            self.send_error(500)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(found[1]) : int(found[2]) + 1] if found and server.ranges else content
        part += b"x" * server.longer
        self.send_response(206 if server.ranges else 200)
        if server.ranges:
            self.send_header("Content-Range", f"bytes {found[1]}-{found[2]}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(part)

    def log_message(self, *arguments):
        """Quiet."""


@pytest.fixture(autouse=True)
def fresh_connections():
    remote.filesystem_of.cache_clear()


@pytest.fixture
def web(tmp_path):
    """A web server over `web/` of the working folder."""
    (tmp_path / "web").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.asked, server.failures, server.ranges = tmp_path / "web", [], 0, True
    server.longer = 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def write_files(folder):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    folder.mkdir(exist_ok=True)
    (folder / "in.jsonl").write_bytes(lines)
    (folder / "in.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "in.csv").write_text("\n".join(["text", *TEXTS]))
    table = pa.table({"text": TEXTS})
    pq.write_table(table, folder / "in.parquet", row_group_size=50)
    with pa.ipc.new_stream(str(folder / "in.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=50)


def documents(path, **more):
    return [{"name": "a", "type": "documents", "path": path, **more}]


NAMES = ["in.jsonl", "in.jsonl.gz", "in.csv", "in.parquet", "in.arrow"]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_a_web_server_give_the_rows_of_local_ones(
    name, corpus, make_config, run, rows_of, web
):
    write_files(web.folder)
    changes = {"block_bytes": 1 << 15, "evaluation_fraction": 0.0}
    run(make_config("local", sources=documents(f"web/{name}"), **changes))
    run(make_config("remote", sources=documents(f"{web.url}/{name}?v=1"), **changes))
    assert rows_of("remote") == rows_of("local")
    assert len(rows_of("remote")) > 10


def test_the_signature_of_an_address_is_in_no_file_of_the_output(
    corpus, make_config, run, web, tmp_path
):
    (web.folder / "in.jsonl").write_text('{"text": "stone"}\n' * 60 + "no json\n")
    address = f"{web.url}/in.jsonl?X-Amz-Signature=TOPSECRET&v=1"
    run(make_config(sources=documents(address), max_reject_fraction=0.5))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    texts = b"".join(path.read_bytes() for path in files)
    assert {"prepare.json", "rejects.jsonl"} <= {path.name for path in files}
    assert b"in.jsonl" in texts and b"TOPSECRET" not in texts


def test_ranges_are_read_of_a_large_file_and_not_all_of_it_each_time(corpus, make_config, run, web):
    lines = "".join(json.dumps({"text": text, "notes": text * 100}) + "\n" for text in TEXTS)
    (web.folder / "in.jsonl").write_text(lines)
    size = (web.folder / "in.jsonl").stat().st_size
    run(make_config(sources=documents(f"{web.url}/in.jsonl"), block_bytes=1 << 21))
    ranges = [range(*map(int, asked.removeprefix("bytes=").split("-"))) for asked in web.asked]
    assert size > 5 << 20  # most of it in a field that is not asked for
    assert sum(map(len, ranges)) < 3 * size
    assert sum(asked.start > 0 for asked in ranges) > 3


def test_a_server_that_fails_for_a_moment_is_asked_again(corpus, make_config, run, web):
    write_files(web.folder)
    web.failures = 2
    manifest = run(make_config(sources=documents(f"{web.url}/in.jsonl")))
    assert manifest.sources[0].documents == len(TEXTS)


@pytest.mark.parametrize("longer", [1, 10_000_000])
def test_a_reply_of_more_than_was_asked_for_is_not_read_on(
    longer, corpus, make_config, run, web, monkeypatch
):
    write_files(web.folder)
    config = make_config(sources=documents(f"{web.url}/in.jsonl"))
    web.longer = longer
    read = []
    request_range = remote.request_range

    def counted(url, first, last):
        reply = request_range(url, first, last)
        take = reply.read
        monkeypatch.setattr(reply, "read", lambda size: read.append(take(size)) or read[-1])
        return reply

    monkeypatch.setattr(remote, "request_range", counted)
    with pytest.raises(DataError, match=r"in\.jsonl: cannot be read"):
        run(config)
    assert read
    assert max(map(len, read)) <= remote.HTTP_BUFFER + 1


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        ({}, "/none.jsonl", r"http://.*/none\.jsonl: not found; correct the path"),
        ({"failures": 99}, "/in.jsonl", r"in\.jsonl: cannot be reached \(HTTP Error 500"),
        ({"ranges": False}, "/in.jsonl", r"in\.jsonl: the server gives no byte ranges; download"),
        ({}, "/*.jsonl", r'source "a": http://.*/\*\.jsonl: HTTP lists no files; name each file'),
    ],
)
def test_what_a_server_cannot_give_is_one_line(
    change, path, message, corpus, make_config, run, web
):
    write_files(web.folder)
    for name, value in change.items():
        setattr(web, name, value)
    with pytest.raises(DataError, match=message) as error:
        run(make_config(sources=documents(web.url + path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["hf:roneneldan/TinyStories", "s3://bucket/*.jsonl", "abfs://a/b"])
def test_without_a_network_or_a_package_the_remedy_is_named(
    name, corpus, make_config, run, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(
        HeadraceError, match=r"download the files and name them|pip install"
    ) as error:
        run(make_config(sources=documents(name, format="jsonl")))
    assert "\n" not in str(error.value)


def test_files_of_s3_are_listed_and_give_the_rows_of_local_ones(
    corpus, make_config, run, rows_of, monkeypatch
):
    s3_server = pytest.importorskip("s3_server")
    write_files(Path("bucket"))
    server = s3_server.S3Server(Path("bucket").resolve())
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    try:
        (Path("bucket") / "more" / "deep").mkdir(parents=True)
        (Path("bucket") / "more" / "deep" / "x.jsonl").write_text('{"text": "x"}\n')
        run(make_config("local", sources=documents("bucket/in.*")))
        run(make_config("remote", sources=documents("s3://bucket/in.*")))
        manifest = run(make_config("deep", sources=documents("s3://bucket/**/*.jsonl")))
    finally:
        server.close()
    assert sorted(row["input_ids"] for row in rows_of("remote")) == sorted(
        row["input_ids"] for row in rows_of("local")
    )
    assert manifest.sources[0].documents == len(TEXTS) + 1


def test_files_of_google_storage_are_listed_and_give_the_rows_of_local_ones(
    corpus, make_config, run, rows_of, monkeypatch
):
    gcs_server = pytest.importorskip("gcs_server")
    write_files(Path("bucket"))
    (Path("bucket") / "more" / "deep").mkdir(parents=True)
    (Path("bucket") / "more" / "deep" / "x.jsonl").write_text('{"text": "x"}\n')
    run(make_config("local", sources=documents("bucket/in.*")))
    with gcs_server.serving_google(Path("bucket").resolve()) as host:
        options = f"?anonymous=true&scheme=http&endpoint_override={host}"
        run(make_config("remote", sources=documents(f"gs://bucket/in.*{options}")))
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://{host}")
        deep = run(make_config("deep", sources=documents("gs://anonymous@bucket/more/**/*.jsonl")))
        with pytest.raises(DataError, match=r"^gs://.*/none\.jsonl: not found; correct the path"):
            run(make_config("none", sources=documents("gs://anonymous@bucket/none.jsonl")))
    assert sorted(row["input_ids"] for row in rows_of("remote")) == sorted(
        row["input_ids"] for row in rows_of("local")
    )
    assert deep.sources[0].documents == 1


def test_a_bucket_without_credentials_is_one_line_and_no_long_wait(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")
    with pytest.raises(DataError, match=r"^gs://.*cannot be reached .*; check name, acc") as error:
        list_remote("mill", "gs://bucket/*.jsonl", answer_seconds=0.5)
    assert "\n" not in str(error.value)


def test_what_fsspec_opens_is_read_through_it(corpus, make_config, run, rows_of):
    write_files(Path("files"))
    memory = fsspec.filesystem("memory")
    for name in NAMES:
        memory.pipe(f"/set/{name}", Path("files", name).read_bytes())
    run(make_config("local", sources=documents("files/in.*")))
    run(make_config("remote", sources=documents("memory://set/in.*")))
    assert sorted(row["input_ids"] for row in rows_of("remote")) == sorted(
        row["input_ids"] for row in rows_of("local")
    )


class LostFile(fsspec.implementations.memory.MemoryFile):
    """A file whose connection breaks."""

    reads = 0

    def read(self, size=-1):
        self.reads += 1
        if self.reads == 2:
            raise RuntimeError("connection lost")
        return super().read(size)


@pytest.mark.parametrize("name", NAMES)
def test_a_connection_that_breaks_is_one_line(name, corpus, make_config, run, monkeypatch):
    write_files(Path("files"))
    memory = fsspec.filesystem("memory")
    memory.pipe("/lost/" + name, Path("files", name).read_bytes())

    def open_lost(path, mode="rb", **more):
        return LostFile(memory, path, memory.cat(path))

    monkeypatch.setattr(memory, "open", open_lost)
    with pytest.raises(DataError, match=r"^memory://lost/in\..*connection lost") as error:
        run(make_config(sources=documents(f"memory://lost/{name}")))
    assert "\n" not in str(error.value)


class HubHandler(BaseHTTPRequestHandler):
    """As much of Hugging Face's hub as it takes to list and read the files of a data set."""

    def do_GET(self):
        path = urllib.parse.unquote(self.path)
        files, _, inner = self.server.files, *path.partition("/refs/convert/parquet")[1:]
        if path.startswith("/api/datasets/me/set/tree/"):
            folder = inner.partition("?")[0].strip("/")
            reply = json.dumps(list(entries(files, folder, "recursive=true" in path.lower())))
            self.reply(200, reply.encode())
        elif path.startswith("/datasets/me/set/resolve/"):
            content = files[inner.strip("/")]
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            part = content[int(found[1]) : int(found[2]) + 1] if found else content
            self.reply(206 if found else 200, part)
        else:
            known = path.startswith("/api/datasets/me/set/")
            self.reply(200 if known else 404, json.dumps({"id": "me/set"}).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        paths = json.loads(body)["paths"] if body[:1] == b"{" else []
        paths = paths or urllib.parse.parse_qs(body.decode()).get("paths", [])
        found = [entry for entry in entries(self.server.files, "", True) if entry["path"] in paths]
        self.reply(200, json.dumps(found).encode())

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Quiet."""


def entries(files, folder, recursive):
    """What lies in a folder of a data set, as the hub lists it."""
    start = f"{folder}/" if folder else ""
    inside = [name for name in files if name.startswith(start)]
    folders = {str(parent) for name in inside for parent in PurePosixPath(name).parents}
    for name in sorted({*inside, *folders}):
        rest = name.removeprefix(start)
        if name.startswith(start) and rest and name != "." and (recursive or "/" not in rest):
            kind = "file" if name in files else "directory"
            yield {"type": kind, "path": name, "oid": "1", "size": len(files.get(name, b""))}


HUB_SCRIPT = """
import sys
from headrace.dataprep.prepare import prepare
from headrace.schemas.prepare.prepare_config import PrepareConfig
prepare(PrepareConfig.model_validate_json(sys.argv[1]), 1)
"""


def test_a_name_on_the_hub_is_its_export_as_parquet(corpus, make_config, run, rows_of):
    write_files(Path("files"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    name = "default/{}/0000.parquet"
    content = Path("files/in.parquet").read_bytes()
    server.files = {name.format("train"): content, name.format("test"): b"other"}
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    config = make_config("remote", sources=documents("hf:me/set"))
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",  # read when the library is loaded
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environment.pop("HF_HUB_OFFLINE", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", HUB_SCRIPT, config.model_dump_json()],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    run(make_config("local", sources=documents("files/in.parquet")))
    assert rows_of("remote") == rows_of("local")


@pytest.mark.parametrize(
    ("path", "pattern", "fit"),
    [
        ("a/b.txt", "a/*.txt", True),
        ("a/c/b.txt", "a/*.txt", False),
        ("a/c/b.txt", "a/**/*.txt", True),
        ("a/b.txt", "a/**/*.txt", True),
        ("a/b.txt", "**", True),
        ("a/b.txt", "*", False),
    ],
)
def test_a_star_stays_in_its_folder_and_two_cross_folders(path, pattern, fit):
    assert fits(path, pattern) is fit
