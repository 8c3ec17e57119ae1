"""Which files a source reads."""

import glob
import os
from pathlib import Path

import pytest

from headrace.dataprep.input.files import find_source_files
from headrace.dataprep.input.walk import expand_glob
from headrace.schemas.errors import DataError
from headrace.schemas.prepare.source_config import SourceConfig


def source(path, exclude=()):
    return SourceConfig(name="s", type="text", path=str(path), exclude=list(exclude))


@pytest.fixture
def tree(tmp_path):
    for name in ("b.txt", "a.txt", "tests/c.txt", "deep/tests/d.txt"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path


def names(files, root):
    return [file.path.removeprefix(f"{root}/") for file in files]


def test_files_come_sorted_by_path_and_each_once(tree):
    several = SourceConfig(name="s", type="text", path=[f"{tree}/**/*.txt", f"{tree}/a.txt"])
    expected = ["a.txt", "b.txt", "deep/tests/d.txt", "tests/c.txt"]
    assert names(find_source_files(several), tree) == expected


def test_exclude_leaves_out_files_in_any_folder_of_that_name(tree):
    files = find_source_files(source(f"{tree}/**/*.txt", ["*/tests/*"]))
    assert names(files, tree) == ["a.txt", "b.txt"]


def test_excluding_everything_is_an_error(tree):
    with pytest.raises(DataError, match=r'^source "s": exclude leaves none of 4 files$'):
        find_source_files(source(f"{tree}/**/*.txt", ["*"]))


def test_what_is_no_file_of_a_plain_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(DataError, match="pipe is no regular file"):
        find_source_files(source("p*"))
    Path(os.fsdecode(b"a\xff.txt")).write_text("a")
    with pytest.raises(DataError, match=r"a\\udcff\.txt' is no printable UTF-8"):
        find_source_files(source("a*"))


def test_a_pattern_that_matches_too_many_files_is_refused(tree):
    with pytest.raises(DataError, match="matches more than 1 files"):
        find_source_files(source(f"{tree}/**/*.txt"), most=1)


PATTERNS = (
    "*.txt **/*.txt **/tests/* */*.txt ** **/** tests/*.txt tests/../a.txt **/tests/**/*.txt "
    "[ab].txt ?.txt **/.* .hidden/*.txt link/*.txt **/link/** ./*.txt *.txt/ none/*.txt **/c.txt"
).split()


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_names_the_files_that_glob_finds(pattern, absolute, tree, monkeypatch):
    for name in (".hidden/e.txt", "deep/.f.txt", "deep/.g/h.txt"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("x")
    (tree / "link").symlink_to(tree / "tests")
    (tree / "broken").symlink_to(tree / "nowhere")
    monkeypatch.chdir(tree)
    pattern = f"{tree}/{pattern}" if absolute else pattern
    listed = glob.glob(pattern, recursive=True)  # noqa: PTH207  the reference
    wanted = {path for path in listed if not Path(path).is_dir()}
    found = {os.path.normpath(path) for path in expand_glob("s", pattern)}
    assert found == {os.path.normpath(path) for path in wanted}


def test_a_pattern_that_looks_at_too_many_files_is_refused(tree):
    with pytest.raises(DataError, match=r'^source "s": .* looks at more than 3 files and folders'):
        list(expand_glob("s", f"{tree}/**/none.txt", most=3))
