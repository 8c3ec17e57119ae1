"""What is published is whole, whenever the writer dies."""

import fcntl
import os

import pytest

from headrace.schemas import publish
from headrace.schemas.publish import create_file, remove_tree, rename_durably, write_atomic


class PowerCut(BaseException):
    pass


def fail_at_call(monkeypatch, number: int) -> None:
    """Let the n-th fsync or rename fail, and every one after it."""
    calls = 0
    fsync_path, rename = publish.fsync_path, publish.rename

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls >= number:
            raise PowerCut

    monkeypatch.setattr(publish, "fsync_path", lambda path: (count(), fsync_path(path)))
    monkeypatch.setattr(publish, "rename", lambda path, to: (count(), rename(path, to)))


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    write_atomic(path, b"new")

    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_cut_while_writing_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        fail_at_call(patch, call)
        write_atomic(path, "new")

    assert path.read_text() == ("new" if call == 3 else "old")
    write_atomic(path, "newer")
    assert path.read_text() == "newer"


@pytest.mark.parametrize("call", range(1, 6))
def test_a_cut_while_publishing_a_directory_shows_all_of_it_or_none(tmp_path, monkeypatch, call):
    temporary, path = tmp_path / ".out.tmp", tmp_path / "out"
    (temporary / "sub").mkdir(parents=True)
    (temporary / "sub" / "a").write_text("a")
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        fail_at_call(patch, call)
        rename_durably(temporary, path)

    assert path.exists() == (call == 5)
    assert not path.exists() or (path / "sub" / "a").read_text() == "a"


def test_a_directory_is_gone_under_its_name_before_its_files_are(tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.mkdir()
    (path / "a").write_text("a")
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        fail_at_call(patch, 1)
        remove_tree(path)
    assert (path / "a").exists()

    remove_tree(path)
    assert list(tmp_path.iterdir()) == []


def test_no_link_under_a_foreseen_name_is_written_through(tmp_path):
    path, victim = tmp_path / "file", tmp_path / "victim"
    victim.write_text("mine")
    for name in (".file.tmp", ".file.0.tmp"):
        (tmp_path / name).symlink_to(victim)
    write_atomic(path, "new")
    assert (path.read_text(), victim.read_text()) == ("new", "mine")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / ".file.tmp")


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / "file"
    left, held = tmp_path / ".file.a.tmp", tmp_path / ".file.b.tmp"
    left.write_text("half")
    with create_file(held) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomic(path, "new")
        assert sorted(tmp_path.iterdir()) == [held, path]


def test_published_files_have_the_mode_that_the_umask_leaves(tmp_path):
    temporary = tmp_path / ".out.tmp"
    temporary.mkdir()
    (temporary / "weights").touch(mode=0o600)
    before = os.umask(0o022)
    try:
        rename_durably(temporary, tmp_path / "out")
        write_atomic(tmp_path / "file", "a")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("out/weights", "file")]
    assert modes == [0o644, 0o644]
