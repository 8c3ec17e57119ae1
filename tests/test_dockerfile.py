"""The Dockerfile installs what constraints.txt pins, from files that are here."""

import re
import shlex
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def arguments_of(instruction):
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def installed():
    """What each `pip install` is given beside its options."""
    for command in arguments_of("RUN"):
        words = shlex.split(command)
        if "pip" in words and "install" in words:
            assert words[words.index("-c") + 1] == "constraints.txt"
            yield [word for word in words[words.index("-c") + 2 :] if not word.startswith("-")]


def pinned():
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonicalize_name(Requirement(line).name) for line in lines if "==" in line}


def test_every_package_that_it_names_is_pinned():
    first, (project,) = installed()
    assert {"torch", "numpy", "setuptools", "wheel"} <= set(first) <= pinned()
    extras = re.fullmatch(r"\.\[([\w,-]+)\]", project)[1].split(",")
    assert "train" in extras
    wanted = [Requirement(line) for line in PROJECT["dependencies"]]
    for extra in extras:
        wanted += [Requirement(line) for line in PROJECT["optional-dependencies"][extra]]
    assert {canonicalize_name(item.name) for item in wanted} <= pinned()


def test_it_copies_what_is_here_and_all_that_is_packaged():
    names = {word for line in arguments_of("COPY") for word in line.split()[:-1]}
    assert names
    assert all((ROOT / name).exists() for name in names)
    assert {"schemas", "dataprep", "kernels", "trainer", "jobs"} <= names
    assert {"constraints.txt", "pyproject.toml", PROJECT["readme"], "LICENSE"} <= names


def test_its_python_is_one_that_the_project_takes():
    (image,) = arguments_of("FROM")
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", image)[1]
    assert version in SpecifierSet(PROJECT["requires-python"])


def test_it_starts_the_command_line():
    assert arguments_of("ENTRYPOINT") == ['["headrace"]']
    assert PROJECT["scripts"]["headrace"] == "headrace.jobs.cli:main"
