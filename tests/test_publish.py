"""What is published is whole, whenever the writer dies."""

import os
from pathlib import Path

import pytest

from headrace.schemas.publish import remove_tree, rename_durably, write_atomic


class PowerCut(BaseException):
    pass


def fail_at_call(monkeypatch, number: int) -> None:
    """Let the n-th fsync or rename fail, and every one after it."""
    calls = 0
    fsync, replace = os.fsync, Path.replace

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls >= number:
            raise PowerCut

    monkeypatch.setattr(os, "fsync", lambda descriptor: (count(), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (count(), replace(path, to)))


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
