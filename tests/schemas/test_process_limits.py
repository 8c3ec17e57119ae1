"""Closed streams and low limits of open files neither end a run late nor reach its files."""

import subprocess
import sys

import pytest

from headrace.schemas.errors import ConfigError
from headrace.schemas.process_limits import wanted_limit

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
    ("soft", "hard", "wanted"),
    [(64, 1 << 20, 4096), (64, 1024, 1024), (1 << 16, 1 << 20, 1 << 16), (64, -1, 4096)],
)
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(soft, hard, wanted):
    assert wanted_limit(soft, hard) == wanted


def test_the_limit_of_a_process_is_changed():
    program = "import resource; from headrace.schemas.process_limits import allow_open_files; "
    program += "allow_open_files(); print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    command = 'ulimit -Sn 128; ulimit -Hn 1000; exec "$0" -c "$1"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, program], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["1000", "1000"]


def test_a_limit_that_is_too_low_is_named():
    with pytest.raises(ConfigError, match=r"ulimit -n 64: .*; raise the limit"):
        wanted_limit(64, 64)
