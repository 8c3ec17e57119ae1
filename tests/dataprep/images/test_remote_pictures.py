"""Pictures on S3 and on a web server: the rows of local ones, and downloads that break off."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import Handler, S3Server

from headrace.dataprep.prepare import prepare

BROKEN = "3.png"


class Breaking(Handler):
    """Breaks off in the middle of one picture, whose size it has told before."""

    def answer_object(self, with_body):
        wished = self.headers.get("Range", "")
        if with_body and self.path.split("?")[0].endswith(BROKEN) and wished != "bytes=0-0":
            self.send_response(206)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"cut")
            self.close_connection = True
        else:
            super().answer_object(with_body)


class BreakingServer(S3Server):
    """A server of S3, and of plain HTTP, over a folder."""

    handler = Breaking


@pytest.fixture
def server(pictures):
    server = BreakingServer(pictures.parent)
    yield server
    server.close()


def about(picture):
    question = {"role": "user", "content": "<image> What is it?"}
    answer = {"role": "assistant", "content": "the wheel turns"}
    return {"images": [picture], "messages": [question, answer]}


def tiles_of(folder):
    rows = pq.read_table(next(Path(folder).glob("shard-*.parquet"))).to_pylist()
    return sorted(tile["bytes"] for row in rows for tile in row["images"])


SLOW = pytest.param("S3 by its folder", marks=pytest.mark.exhaustive)  # Arrow asks again


@pytest.mark.parametrize("kind", [SLOW, "HTTP by its folder", "HTTP by addresses"])
def test_pictures_behind_urls_are_those_of_a_folder(kind, server, config, write_rows, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    host = f"127.0.0.1:{server.port}"
    url = f"http://{host}/bucket/pictures"
    images = {"folder": url}
    if kind.startswith("S3"):
        options = f"?anonymous=true&scheme=http&endpoint_override={host}&region=us-east-1"
        images = {"folder": f"s3://bucket/pictures{options}"}
    elif kind.endswith("addresses"):
        images = {"folder": None, "addresses": [url]}
    names = [f"{number}.png" for number in (1, 2, 5)]
    write_rows([about(name) for name in names])
    prepare(config("local", shards=1))
    start = f"{url}/" if kind.endswith("addresses") else ""
    write_rows([about(start + name) for name in [*names, BROKEN]])
    prepare(config("remote", shards=1, images=images))
    assert tiles_of("remote") == tiles_of("local")
    (reject,) = map(json.loads, Path("remote/rejects/rejects.jsonl").read_text().splitlines())
    assert reject["reason"] == "unreachable picture"


def test_columns_of_bytes_and_paths_hold_pictures_or_name_them(pictures, config, write_rows):
    values = [
        {"bytes": (pictures / "1.png").read_bytes(), "path": "elsewhere.png"},
        {"bytes": None, "path": "2.png"},
        {"bytes": (pictures / "5.png").read_bytes()[:-60], "path": None},
    ]
    rows = [{**about(None), "images": None, "image": value} for value in values]
    pq.write_table(
        pa.Table.from_pylist([{k: r[k] for k in ("image", "messages")} for r in rows]),
        "rows.parquet",
    )
    write_rows([about("1.png"), about("2.png")])
    prepare(config("local", shards=1))
    sources = [{"name": "drawn", "type": "chat", "path": "rows.parquet"}]
    prepare(config("columns", shards=1, sources=sources))
    assert tiles_of("columns") == tiles_of("local")
    (reject,) = map(json.loads, Path("columns/rejects/rejects.jsonl").read_text().splitlines())
    assert "picture" in reject["reason"]
