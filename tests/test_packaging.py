"""The wheel installs beside Hugging Face's `kernels`, whose name a bare package would take."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dataprep", "jobs", "kernels", "schemas", "trainer")
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the files that git tracks, as a release is."""
    folder = tmp_path_factory.mktemp("wheel")
    run("git", "checkout-index", "--all", f"--prefix={folder}/source/", cwd=ROOT)
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "-o",
        folder,
        cwd=folder / "source",
    )
    (built,) = folder.glob("headrace-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel and Hugging Face's package; it sees what is installed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    run(*pip, wheel, cwd=folder)
    run(*pip, "--constraint", ROOT / "constraints.txt", "kernels", cwd=folder)
    (site / "installed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin" / "python"


def test_the_wheel_holds_the_five_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert {tuple(name.split("/")[:2]) for name in files} == {("headrace", p) for p in PACKAGES}
    assert "headrace/kernels/__init__.py" not in files


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_imports_from_the_wheel(python, package):
    program = f"import headrace.{package} as package; print(list(package.__path__)[0])"
    folder = run(python, "-c", program, cwd=python.parent)
    assert Path(folder).is_relative_to(python.parents[1])


@pytest.mark.parametrize("folder", [ROOT, Path("/")], ids=["at the root", "elsewhere"])
def test_kernels_is_hugging_faces_and_a_model_class_imports(python, folder):
    program = (
        "import kernels; from transformers import LlamaForCausalLM; "
        "print(kernels.__file__); kernels.get_kernel"
    )
    file = run(python, "-c", program, cwd=folder).splitlines()[-1]
    assert Path(file).is_relative_to(python.parents[1])


def test_the_command_runs_from_the_wheel(python):
    assert "prepare" in run(python, "-m", "headrace.jobs.cli", "--help", cwd=Path("/"))
