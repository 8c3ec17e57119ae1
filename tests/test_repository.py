"""The shape of the repository: what may import what, and what lies where."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
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
FOLDERS = {  # each may import those before it; files outside of folders stand at both ends
    "trainer": """vision shards order families architecture stored adapters quantized layers
        tensor_parallel batches stage
        objectives building
        planning optim export checkpoint metrics pipeline run""".split(),
    "dataprep": "input images text formats axolotl rows work passes shards".split(),
    "schemas": "shards vision train prepare".split(),
    "jobs": """old_systems trainer_arguments migration report first_run console commands serve
        tools""".split(),
}
# of the trainer: imported by any folder, import no folder
BASE = set(
    """devices failure messages parallel quiet rank_share rendezvous row_slice
    sequence_slice""".split()
)
MOST_FILES = 18  # in a folder, its __init__ left out
LONGEST_FUNCTION = 60  # lines
LONGER_FUNCTIONS = {"_loss_and_gradient"}  # a kernel, which is one loop
LONGEST_CHAIN = 12  # modules that import one the next; it may only fall
WHOLE_CONFIG = 13  # files of the trainer that are given the whole config; it may only fall
LEARNING = {"accelerate", "deepspeed", "peft", "torch", "transformers", "triton"}
FORBIDDEN = {"schemas": {*LEARNING, "rich"}, "dataprep": {*LEARNING, "rich"}, "trainer": {"rich"}}
KERNELS_THIRD_PARTY = {"torch", "triton"}
TOP_LEVEL = {
    *MAY_IMPORT,
    "tests",
    "docs",
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
    "README.md",
    "CONTRIBUTING.md",
    "Dockerfile",
    ".dockerignore",
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


def module_of(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return f"headrace.{name}".removesuffix(".__init__")


MODULES = {module_of(source) for source in SOURCES}


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


@pytest.mark.parametrize("package", FOLDERS)
def test_every_folder_has_its_place_in_the_order(package):
    folders = {path.parent.name for path in (ROOT / package).glob("*/*.py")}
    assert folders == set(FOLDERS[package])


@pytest.mark.parametrize(
    ("package", "folder"), [(top, name) for top, names in FOLDERS.items() for name in names]
)
def test_folders_import_those_before_them_alone(package, folder):
    """Imports inside functions count as well."""
    order = FOLDERS[package]
    allowed = {*order[: order.index(folder) + 1], *BASE}
    if package in {"schemas", "jobs"}:
        allowed |= {path.stem for path in (ROOT / package).glob("*.py")}
    for path in (ROOT / package / folder).glob("*.py"):
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[:2] == ["headrace", package] and len(parts) > 2:
                assert parts[2] in allowed, f"{path}: {module}"


def test_what_every_folder_may_import_imports_no_folder():
    base = {f"headrace.trainer.{name}" for name in BASE}
    for name in BASE:
        for module in imported_modules(ROOT / "trainer" / f"{name}.py"):
            assert module in base or not module.startswith("headrace.trainer."), module


def modules_imported(path: Path) -> Iterator[str]:
    """Yield the modules of the project that a file imports, inside functions as well.

    What only type checkers read is left out.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in typing:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_modules_import_each_other_in_a_circle():
    order = TopologicalSorter({module_of(path): set(modules_imported(path)) for path in SOURCES})
    order.prepare()  # raises CycleError, which names the circle


def longest_chain() -> list[str]:
    """Return the modules of the longest chain of imports, from the one that imports the rest."""
    imports = {module_of(path): MODULES.intersection(modules_imported(path)) for path in SOURCES}
    chains: dict[str, list[str]] = {}
    for module in TopologicalSorter(imports).static_order():
        below = max((chains[name] for name in sorted(imports[module])), key=len, default=[])
        chains[module] = [module, *below]
    return max(chains.values(), key=len)


def test_chains_of_imports_stay_short():
    """Reaching the bottom from the top takes few steps; imports inside functions count."""
    chain = longest_chain()
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def test_few_files_of_the_trainer_are_given_the_whole_config():
    """Others take the keys that they read: `ModelConfig`, `DataConfig`, `LoaderConfig`, ..."""
    whole = "headrace.schemas.train.train_config"
    found = [
        name
        for name, path in zip(names(SOURCES), SOURCES, strict=True)
        if name.startswith("trainer/") and whole in imported_modules(path)
    ]
    assert len(found) <= WHOLE_CONFIG, found


def long_functions(path: Path) -> Iterator[str]:
    """Yield the functions of a file that have more lines than any should."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield node.name


def test_functions_are_short():
    found = {name for path in SOURCES for name in long_functions(path)}
    assert found == LONGER_FUNCTIONS


def test_no_folder_holds_too_many_files():
    counts = Counter(path.parent for path in SOURCES if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_dataprep_and_the_command_line_leave_torch_unloaded():
    modules = [
        module_of(path)
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


@pytest.mark.parametrize("package", FOLDERS)
def test_the_page_on_architecture_names_the_folders_in_their_order(package):
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition(f"| `{package}/` | holds |\n| --- | --- |\n")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == FOLDERS[package]


def test_what_the_page_on_architecture_names_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tops = "|".join([*MAY_IMPORT, "tests"])
    named = re.findall(rf"\b((?:{tops})/[\w/]+(?:\.py)?)", page)
    assert len(named) > 40
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_what_the_page_on_architecture_says_is_in_a_file_is_defined_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| what | file | name |\n| --- | --- | --- |\n")[2].partition("\n\n")[0]
    found = re.findall(r"^\| .* \| `(\S+)` \| `(\w+)` \|$", table, re.MULTILINE)
    assert len(found) == len(table.splitlines()) > 20
    defined = re.compile(r"^(?:def|class) (\w+)|^(\w+)(?:: .*)? = ", re.MULTILINE)
    for path, name in found:
        names = defined.findall((ROOT / path).read_text(encoding="utf-8"))
        assert name in {part for pair in names for part in pair}, f"{path}: {name}"
