"""Shards behind URLs are read by byte range; what fails is tried again, and never hangs."""

import os
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from gcs_server import serving_google
from s3_server import S3Server

from headrace.schemas.errors import ConfigError, DataError, StorageError
from headrace.schemas.retries import Patience
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.schemas.train.data_config import LoaderConfig
from headrace.trainer.shards.row_group_source import RowGroupSource
from headrace.trainer.shards.row_groups import RowGroup
from headrace.trainer.shards.storage import open_storage

BRIEF = Patience(4, 1.0, first_pause=0.05)


@pytest.fixture
def s3(tiny_shards, tmp_path, monkeypatch):
    """The tiny shards as s3://bucket/tiny, on a server that can be told to fail."""
    shutil.copytree(tiny_shards, tmp_path / "bucket" / "tiny")
    server = S3Server(tmp_path / "bucket")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


def make_source(path, shards, patience=BRIEF, **settings):
    config, manifests = LoaderConfig.model_validate(settings), [read_manifest(shards)]
    return RowGroupSource([str(path)], manifests, "train", config, patience=patience)


def row_groups(shards):
    return [
        RowGroup(0, shard, group, record.rows)
        for shard, file in enumerate(read_manifest(shards).split("train"))
        for group, record in enumerate(file.row_groups)
    ]


def assert_same_rows(source, shards):
    for row_group in row_groups(shards):
        file = source.files[0][row_group.shard].record.file
        expected = pq.ParquetFile(shards / file).read_row_group(row_group.group)
        assert_same_values(source.read(row_group), expected)


def assert_same_values(table, expected):
    """Ids may be held in two bytes in place of four."""
    expected = expected.select(table.column_names).combine_chunks()
    assert table.cast(expected.schema).equals(expected)


def test_a_row_group_is_fetched_by_its_range_and_the_footer_once_a_file(s3, tiny_shards):
    source = make_source("s3://bucket/tiny", tiny_shards)
    assert_same_rows(source, tiny_shards)
    asked = [request for request in s3.requests if request.startswith("GET")]
    shards = read_manifest(tiny_shards).split("train")
    groups = [(shard, group) for shard in shards for group in shard.row_groups]
    assert len(asked) == len(groups) + len(shards)
    for shard, group in groups:
        last = group.byte_offset + group.bytes - 1
        assert f"GET /bucket/tiny/{shard.file} bytes={group.byte_offset}-{last}" in asked


def test_the_manifest_is_that_of_the_folder(s3, tiny_shards):
    storage = open_storage("s3://bucket/tiny/", BRIEF)
    assert storage.manifest() == read_manifest(tiny_shards)
    message = "s3://bucket/none/manifest.json: not found; run `headrace prepare`"
    with pytest.raises(DataError, match=message):
        open_storage("s3://bucket/none", BRIEF).manifest()


def test_sizes_come_from_a_listing(s3, tiny_shards):
    storage = open_storage("s3://bucket/tiny", BRIEF)
    names = ["shard-00000.parquet", "none.parquet", "shard-00001.parquet"]
    first, missing, second = storage.sizes(names)
    assert missing is None
    assert (first, second) == tuple((tiny_shards / n).stat().st_size for n in names[::2])
    assert len(s3.requests) <= 2


@pytest.mark.parametrize("fault", [500, "cut", "hang"])
def test_an_attempt_that_fails_is_made_again(s3, tiny_shards, fault):
    s3.faults = [("GET", fault, 2), ("HEAD", fault, 1)]
    source = make_source("s3://bucket/tiny", tiny_shards, replace(BRIEF, timeout=0.5))
    expected = pq.ParquetFile(tiny_shards / "shard-00000.parquet").read_row_group(0)
    assert_same_values(source.read(row_groups(tiny_shards)[0]), expected)
    assert all(times == 0 for _, _, times in s3.faults), "the faults must have been met"


@pytest.mark.parametrize(
    ("fault", "reason"), [(500, "AWS Error"), ("hang", "no answer within 0.3 s")]
)
def test_a_storage_that_keeps_failing_ends_in_a_named_error(s3, tiny_shards, fault, reason):
    s3.faults = [("shard-00000", fault, 99)]
    source = make_source("s3://bucket/tiny", tiny_shards, replace(BRIEF, timeout=0.3))
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        source.read(row_groups(tiny_shards)[0])
    assert time.monotonic() - started < 5
    message = str(caught.value)
    assert message.startswith("s3://bucket/tiny: read shard-00000.parquet: failed 4 times")
    assert reason in message
    assert "\n" not in message


def test_a_refusal_is_not_asked_again(s3, tiny_shards):
    s3.faults = [("HEAD", 403, 99)]
    with pytest.raises(StorageError, match="refused"):
        make_source("s3://bucket/tiny", tiny_shards).read(row_groups(tiny_shards)[0])
    assert len(s3.requests) == 1


def test_a_server_that_is_restarted_is_found_again(s3, tiny_shards):
    source = make_source("s3://bucket/tiny", tiny_shards, Patience(4, 1.0, first_pause=0.3))
    groups = row_groups(tiny_shards)
    source.read(groups[0])
    s3.stop()
    threading.Timer(0.6, s3.start).start()
    assert source.read(groups[1]).num_rows == groups[1].rows


def test_a_missing_or_shorter_object_is_damage_and_not_asked_again(s3, tiny_shards):
    object_ = s3.folder / "tiny" / "shard-00000.parquet"
    object_.write_bytes(object_.read_bytes()[:-10])
    source = make_source("s3://bucket/tiny", tiny_shards)
    message = r"^s3://bucket/tiny/shard-00000.parquet: row group 0 cannot be read, rows 0 to 15 \("
    with pytest.raises(DataError, match=message + "the file ends 10 bytes too early"):
        source.read(row_groups(tiny_shards)[0])
    object_.unlink()
    with pytest.raises(DataError, match=message):
        make_source("s3://bucket/tiny", tiny_shards).read(row_groups(tiny_shards)[0])


def test_google_storage_gives_the_same_rows(tiny_shards):
    with serving_google(tiny_shards.parent) as host:
        url = f"gs://bucket/{tiny_shards.name}?anonymous=true&scheme=http&endpoint_override={host}"
        storage = open_storage(url, BRIEF)
        assert storage.manifest() == read_manifest(tiny_shards)
        file = read_manifest(tiny_shards).split("train")[0].file
        assert storage.sizes([file, "none"]) == [(tiny_shards / file).stat().st_size, None]
        assert_same_rows(make_source(url, tiny_shards), tiny_shards)


def test_file_urls_and_fsspec_urls_give_the_same_rows(tiny_shards):
    assert_same_rows(make_source(f"file://{tiny_shards}", tiny_shards), tiny_shards)
    memory = fsspec.filesystem("memory")
    memory.put(str(tiny_shards), "/shards", recursive=True)
    assert open_storage("memory://shards", BRIEF).manifest() == read_manifest(tiny_shards)
    assert_same_rows(make_source("memory://shards", tiny_shards), tiny_shards)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://a/b", "nothing://a/b: no storage is known as nothing://; use s3, gs or hf"),
        ("abfs://a/b", "abfs://a/b: abfs:// needs: pip install fsspec adlfs"),
        ("s3://a/b?regoin=x", "s3://a/b.regoin=x: unknown option regoin; known: anonymous, "),
        ("gs://a/b?region=x", "gs://a/b.region=x: unknown option region; known: anonymous, "),
    ],
)
def test_a_url_that_cannot_be_opened_says_what_to_do(url, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        open_storage(url, BRIEF)


def test_pauses_grow_and_differ():
    pauses = []

    def fail():
        raise OSError("no")

    with pytest.raises(StorageError, match="failed 9 times"):
        Patience(9, 1.0, pauses.append).ask("x", fail)
    bounds = [min(30.0, 0.5 * 2**index) for index in range(8)]
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))


MOTO = shutil.which("moto_server")


@pytest.mark.exhaustive
@pytest.mark.skipif(MOTO is None, reason="no moto_server; pip install 'moto[server]' elsewhere")
def test_rows_from_motos_s3_server_are_the_same(tiny_shards, monkeypatch):
    """moto cannot be a dependency: botocore wants an older python-dateutil than we pin."""
    environment = {**os.environ, "PYTHONPATH": ""}
    server = subprocess.Popen([MOTO, "-p", "5123"], env=environment, stderr=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:5123")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        upload(tiny_shards)
        storage = open_storage("s3://made/shards", Patience(6, 20.0))
        assert storage.manifest() == read_manifest(tiny_shards)
        names = [shard.file for shard in storage.manifest().shards]
        sizes = [shard.bytes for shard in storage.manifest().shards]
        assert storage.sizes([*names, "none"]) == [*sizes, None]
        assert_same_rows(make_source("s3://made/shards", tiny_shards), tiny_shards)
    finally:
        server.kill()
        server.wait()


def upload(shards: Path) -> None:
    from pyarrow import fs

    target = fs.S3FileSystem(
        endpoint_override="127.0.0.1:5123", scheme="http", allow_bucket_creation=True
    )
    Patience(20, 5.0).ask("create bucket", lambda: target.create_dir("made"))
    local = fs.LocalFileSystem()
    fs.copy_files(
        str(shards), "made/shards", source_filesystem=local, destination_filesystem=target
    )
