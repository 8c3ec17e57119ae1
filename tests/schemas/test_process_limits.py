"""Closed streams and low limits of open files neither end a run late nor reach its files."""

import resource
import subprocess
import sys

import pytest

from headrace.schemas.errors import ConfigError
from headrace.schemas.process_limits import allow_open_files

PROGRAM = """
import os, sys
from headrace.schemas.process_limits import open_closed_streams
open_closed_streams()
with open(sys.argv[1], "w") as file:
    print("not into the file")
    sys.stdout.flush()
    os.write(1, b"nor this")
assert os.fstat(1).st_rdev == os.stat(os.devnull).st_rdev
"""


def test_what_is_printed_to_a_closed_stream_lands_in_no_file(tmp_path):
    path = tmp_path / "file"
    command = 'exec "$0" -c "$1" "$2" >&-'
    subprocess.run(["bash", "-c", command, sys.executable, PROGRAM, path], check=True)
    assert path.read_text() == ""


@pytest.mark.parametrize(
    ("soft", "hard", "becomes"), [(64, 1 << 20, 4096), (64, 1024, 1024), (1 << 16, 1 << 20, None)]
)
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(monkeypatch, soft, hard, becomes):
    changed = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: changed.append(pair))
    allow_open_files()
    assert changed == ([(becomes, hard)] if becomes else [])


def test_a_limit_that_is_too_low_is_named(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    with pytest.raises(ConfigError, match=r"ulimit -n 64: .*; raise the limit"):
        allow_open_files()
