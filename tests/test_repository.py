"""The shape of the repository: what may import what, and what lies where."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "schemas": set(),
    "kernels": set(),
    "dataprep": {"schemas"},
    "trainer": {"schemas", "kernels"},
    "jobs": {"schemas", "kernels", "dataprep", "trainer"},
}
TRAINER_ORDER = ("data", "model", "export", "run")  # each may import what stands before it
LEARNING = {"accelerate", "deepspeed", "peft", "torch", "transformers", "triton"}
FORBIDDEN = {"schemas": LEARNING, "dataprep": LEARNING}
KERNELS_THIRD_PARTY = {"torch", "triton"}
TOP_LEVEL = {
    *MAY_IMPORT,
    "tests",
    "docs",
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
    "README.md",
    "LICENSE",
    ".ci",
    ".gitignore",
    ".gitattributes",
}
FRAGMENT_OPENINGS = set(
    "after all and as at before but by for from how if in none not of on or so to what when where "
    "whether which who whose with without".split()
)
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_every_package_has_sources():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} >= {
        "schemas",
        "dataprep",
        "trainer",
        "jobs",
    }


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_imports_point_in_one_direction(path):
    package = path.relative_to(ROOT).parts[0]
    allowed = {package, *MAY_IMPORT[package]}

    for module in imported_modules(path):
        parts = module.split(".")
        assert not module.startswith("."), f"relative import {module}"
        assert parts[0] not in MAY_IMPORT, f"{module}: write headrace.{module}"
        assert parts[0] != "headrace" or (len(parts) > 1 and parts[1] in allowed), module
        assert parts[0] not in FORBIDDEN.get(package, set()), module
        if package == "kernels":
            known = {"headrace", *KERNELS_THIRD_PARTY, *sys.stdlib_module_names}
            assert parts[0] in known, module


@pytest.mark.parametrize("package", TRAINER_ORDER)
def test_the_trainers_packages_build_on_each_other_in_order(package):
    later = TRAINER_ORDER[TRAINER_ORDER.index(package) + 1 :]
    for path in (ROOT / "trainer" / package).glob("*.py"):
        for module in imported_modules(path):
            assert not module.startswith(tuple(f"headrace.trainer.{name}" for name in later)), path


def test_dataprep_and_the_command_line_leave_torch_unloaded():
    modules = [
        f"headrace.{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}"
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in {"schemas", "dataprep"}
    ]
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "from headrace.jobs import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"loaded = {LEARNING!r} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the line and the text of each docstring."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", text


def test_no_docstring_opens_with_a_fragment():
    opened = [
        f"{place}: {text.splitlines()[0]}"
        for path in SOURCES
        for place, text in docstrings(path)
        if text.split()[0].strip(".,:;").lower() in FRAGMENT_OPENINGS
    ]
    assert opened == []


def test_no_file_is_named_like_a_standard_library_module():
    assert [name for name in names(SOURCES) if Path(name).stem in sys.stdlib_module_names] == []


def test_kernels_has_no_init_so_that_it_never_shadows_hugging_faces_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for package in MAY_IMPORT.keys() - {"kernels"}:
        assert (ROOT / package / "__init__.py").is_file()


def test_the_top_level_holds_nothing_else():
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert {line.partition("/")[0] for line in listing.stdout.splitlines()} <= TOP_LEVEL


def test_folders_are_at_most_two_deep():
    assert [name for name in names(SOURCES) if len(Path(name).parts) > 3] == []
