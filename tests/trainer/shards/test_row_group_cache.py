"""A cache that several processes share, that may be killed, filled up and damaged."""

import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from headrace.trainer.shards.row_group_cache import RowGroupCache

SIZE = 10_000
PIECE = SIZE + 4  # with its checksum


def content_of(number, size=SIZE):
    return hashlib.shake_128(str(number).encode()).digest(size)


def make_cache(directory, limit=1 << 30, patience=10.0):
    return RowGroupCache(Path(directory), limit, patience)


def get(cache, number, fetched=None):
    def fetch():
        if fetched is not None:
            fetched.append(number)
        return content_of(number)

    return cache.get(f"sha-{number}", 0, SIZE, fetch)


def pieces(directory):
    return sorted(Path(directory).glob("*.piece"))


def no_fetch():
    raise AssertionError("it must come from the cache")


def test_a_piece_is_fetched_once_and_then_read_from_disk(tmp_path):
    fetched = []
    assert get(make_cache(tmp_path), 1, fetched) == content_of(1)
    assert get(make_cache(tmp_path), 1, fetched) == content_of(1)
    assert fetched == [1]


def test_pieces_differ_by_file_offset_and_size(tmp_path):
    cache = make_cache(tmp_path)
    for key in [("a", 0, 3), ("b", 0, 3), ("a", 1, 3), ("a", 0, 4)]:
        cache.get(*key, lambda key=key: repr(key).encode()[:3].ljust(key[2], b"."))
    assert len(pieces(tmp_path)) == 4


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"\1" + b[1:]])
def test_a_damaged_piece_is_never_read(tmp_path, damage, caplog):
    get(make_cache(tmp_path), 1)
    (piece,) = pieces(tmp_path)
    piece.write_bytes(damage(piece.read_bytes()))
    fetched = []
    assert get(make_cache(tmp_path), 1, fetched) == content_of(1)
    assert fetched == [1]
    assert "damaged; fetched again" in caplog.text
    assert make_cache(tmp_path).get("sha-1", 0, SIZE, no_fetch) == content_of(1)


def test_the_least_recently_used_pieces_go_first_and_the_limit_holds(tmp_path):
    cache = make_cache(tmp_path, limit=10 * PIECE)
    for number in range(10):
        get(cache, number)
        os.utime(pieces_by_time(tmp_path)[-1], (number, number))
    get(cache, 0)  # used again, so that 1 is the oldest
    get(cache, 10)
    assert size_of(tmp_path) <= 10 * PIECE
    fetched = []
    for number in (0, 2, 9, 10, 1):
        get(cache, number, fetched)
    assert fetched == [1]


def pieces_by_time(directory):
    return sorted(pieces(directory), key=lambda path: path.stat().st_mtime_ns)


def size_of(directory):
    return sum(path.stat().st_size for path in pieces(directory))


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path):
    assert get(make_cache(tmp_path, limit=PIECE - 1), 1) == content_of(1)
    assert pieces(tmp_path) == []


def test_two_that_want_the_same_piece_fetch_it_once(tmp_path):
    fetched, results = [], []

    def work():
        def fetch():
            fetched.append(1)
            time.sleep(0.2)
            return content_of(1)

        results.append(make_cache(tmp_path).get("sha-1", 0, SIZE, fetch))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [content_of(1)] * 4
    assert len(fetched) == 1


def test_a_fetch_that_fails_leaves_no_lock_and_nothing_else(tmp_path):
    def fail():
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        make_cache(tmp_path).get("sha-1", 0, SIZE, fail)
    assert get(make_cache(tmp_path, patience=0.5), 1) == content_of(1)


HOLDER = """
import sys, time
from headrace.trainer.shards.row_group_cache import RowGroupCache
from pathlib import Path

def fetch():
    print("fetching", flush=True)
    time.sleep(60)

RowGroupCache(Path(sys.argv[1]), 1 << 30, 10.0).get("sha-1", 0, 10000, fetch)
"""


@pytest.mark.parametrize(
    ("number", "patience", "longest"), [(signal.SIGKILL, 30.0, 5.0), (signal.SIGSTOP, 0.3, 5.0)]
)
def test_a_fetching_process_that_is_killed_or_stopped_does_not_hold_up_others(
    tmp_path, number, patience, longest
):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"fetching\n"
        holder.send_signal(number)
        started = time.monotonic()
        assert get(make_cache(tmp_path, patience=patience), 1) == content_of(1)
        assert time.monotonic() - started < longest
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def use_for_ever(directory, seed):
    choose = random.Random(seed)
    cache = make_cache(directory, limit=12 * PIECE)
    while True:
        number = choose.randrange(30)
        assert get(cache, number) == content_of(number)


def kill_users(directory, kills):
    """Four processes use one cache; again and again one of them is killed and another started."""
    choose = random.Random(kills)
    context = multiprocessing.get_context("fork")

    def start(seed):
        process = context.Process(target=use_for_ever, args=(str(directory), seed), daemon=True)
        process.start()
        return process

    users = [start(seed) for seed in range(4)]
    for kill in range(kills):
        time.sleep(choose.random() * 0.05)
        index = choose.randrange(4)
        assert users[index].exitcode is None, "a user met a wrong piece"
        users[index].kill()
        users[index].join()
        users[index] = start(100 + kill)
    for user in users:
        assert user.exitcode is None
        user.kill()
        user.join()


def check_after_kills(directory, kills):
    kill_users(directory, kills)
    started = time.monotonic()
    cache = make_cache(directory, limit=12 * PIECE)
    for number in range(30):
        assert get(cache, number) == content_of(number)
    assert time.monotonic() - started < 5, "a lock outlived its process"
    assert size_of(directory) <= 12 * PIECE


def test_killed_users_leave_no_wrong_piece_no_lock_and_no_growth(tmp_path):
    check_after_kills(tmp_path, 8)


@pytest.mark.exhaustive
def test_two_hundred_killed_users_leave_no_wrong_piece_no_lock_and_no_growth(tmp_path):
    check_after_kills(tmp_path, 200)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("free", [0, 1, *random.Random(1).sample(range(1 << 16), 18)])
def test_a_full_disk_means_no_cache_and_one_warning(tiny_disk, caplog, free):
    """Twenty times, full at another moment."""
    (tiny_disk / "other").write_bytes(bytes((1 << 16) - free))
    cache = make_cache(tiny_disk)
    for number in range(8):
        assert get(cache, number) == content_of(number)
    assert len(caplog.records) == 1
    assert "No space left on device); going on without caching" in caplog.text
    kept = len(pieces(tiny_disk))
    assert kept <= free // SIZE
    assert not (tiny_disk / "incoming").exists()
    for number in range(kept):
        assert cache.get(f"sha-{number}", 0, SIZE, no_fetch) == content_of(number)


def test_a_folder_that_cannot_be_made_means_no_cache_and_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = make_cache(tmp_path / "file" / "cache")
    assert [get(cache, number) for number in range(3)] == [content_of(n) for n in range(3)]
    assert len(caplog.records) == 1
