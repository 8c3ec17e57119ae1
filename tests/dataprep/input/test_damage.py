"""Damage that comes from outside: what is whole stays whole, and the message says what to do."""

import json
import os
import random
import string
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.dataprep.input.json_scan import scan_json
from headrace.schemas.errors import DataError

SCRIPT = """
import io, json, resource, sys
from pathlib import Path
from headrace.dataprep.prepare import prepare
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.prepare_config import PrepareConfig
if __name__ == "__main__":
    config = PrepareConfig.model_validate_json(Path("config.json").read_text())
    limit = int(sys.argv[1])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        prepare(config, int(sys.argv[2]))
    except DataError as error:
        sys.exit(str(error))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def prepare_apart(config, file_limit=0, workers=1):
    """`prepare` in a process of its own, whose files may have so many bytes."""
    Path("script.py").write_text(SCRIPT)
    Path("config.json").write_text(config.model_dump_json())
    return subprocess.run(
        [sys.executable, "script.py", str(file_limit), str(workers)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


def documents(path):
    return [{"name": "a", "type": "documents", "path": path}]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_the_run_can_go_on(workers, corpus, make_config, run, snapshot):
    config = make_config("full", block_bytes=1 << 15)
    done = prepare_apart(config, file_limit=4096, workers=workers)
    assert done.returncode == 1
    assert done.stderr == (
        "full: cannot be written (File too large); make room, then run the same command to go on\n"
    )
    run(config)
    run(make_config("right", block_bytes=1 << 15))
    assert snapshot("full") == snapshot("right")


def test_nul_bytes_are_text_like_any_other(corpus, make_config, run, documents_of):
    (corpus / "000.txt").write_bytes(b"stone\x00mill")
    changes = {"evaluation_fraction": 0.0, "sequence_len": 4096}
    run(make_config(sources=[{"name": "a", "type": "text", "path": "corpus/000.txt"}], **changes))
    assert documents_of("out") == ["stone\x00mill"]


def test_a_raw_nul_byte_in_json_is_refused(corpus, make_config, run):
    Path("in.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b\x00"}\n{"text": "c"}\n')
    manifest = run(make_config(sources=documents("in.jsonl"), max_reject_fraction=1.0))
    (reject,) = map(json.loads, Path("out/rejects/rejects.jsonl").read_text().splitlines())
    assert (reject["line"], reject["reason"]) == (2, "broken JSON")
    assert manifest.sources[0].documents == 2


def test_parquet_damaged_in_its_middle_is_named(corpus, make_config, run):
    random.seed(0)
    texts = ["".join(random.choices(string.printable, k=500)) for _ in range(500)]
    pq.write_table(pa.table({"text": texts}), "in.parquet", compression="zstd")
    content = bytearray(Path("in.parquet").read_bytes())
    content[20_000:40_000] = bytes(20_000)
    Path("in.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"^in\.parquet: damaged Parquet \(.*; replace the file$"):
        run(make_config(sources=documents("in.parquet")))


LARGE = {  # what stands before, between and after the three records of a file
    "in.jsonl": ('{"text": "', '"}\n{"text": "', '"}\n'),
    "in.json": ('[{"text": "', '"},\n{"text": "', '"}]'),
    "in.csv": ("text\n", "\n", "\n"),
    "in.txt": ("", "\n", ""),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LARGE)
def test_a_record_of_300_mb_is_refused_and_memory_stays_bounded(name, corpus, make_config, rows_of):
    before, between, after = LARGE[name]
    with Path(name).open("w") as file:
        file.write(before + "first" + between)
        for _ in range(300):
            file.write("x" * (1 << 20))
        file.write(between + "last" + after)
    sources = documents(name)
    if name == "in.txt":
        sources = [{"name": "a", "type": "text", "path": name, "document_separator": "\n"}]
    config = make_config(sources=sources, max_reject_fraction=1.0, block_bytes=4 << 20)
    done = prepare_apart(config)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1 << 20, "KiB: less than 1 GiB"
    (reject,) = map(json.loads, Path("out/rejects/rejects.jsonl").read_text().splitlines())
    assert reject["reason"] == "too large"
    assert reject["line"] == (3 if name == "in.csv" else 2)
    assert sum(len(row["document_lengths"]) for row in rows_of("out")) == 2


@pytest.mark.exhaustive
def test_a_json_list_of_300_mb_is_read_in_little_memory(tmp_path):
    record = json.dumps({"text": "stone " * 10_000})
    count = 300 * (1 << 20) // len(record)
    with (tmp_path / "in.json").open("w") as file:
        file.write("[" + ",".join([record] * 10))
        for _ in range(count - 10):
            file.write("," + record)
        file.write("]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in scan_json(str(tmp_path / "in.json"), "json", 0, 1 << 26)) == count
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
