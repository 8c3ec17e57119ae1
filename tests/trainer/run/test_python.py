"""The functions that a notebook calls, as docs/python.md shows them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from warm_command import run_warm

PAGE = Path(__file__).parents[3] / "docs" / "python.md"
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fresh(code, folder, monkeypatch):
    """Run code in a new interpreter, with little in its environment."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PATH": "", "HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def forked(code, folder, monkeypatch):
    """Run code in a process that has imported all, and is no rank."""
    monkeypatch.chdir(folder)
    alone = (
        "import os\nfor name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):\n    del os.environ[name]\n"
    )
    script = folder / "script.py"
    script.write_text(alone + code)
    return run_warm([], str(script))


@pytest.mark.parametrize("start", [forked, pytest.param(fresh, marks=pytest.mark.exhaustive)])
def test_a_notebook_prepares_trains_and_goes_on_as_the_page_says(
    tiny_model, tmp_path, monkeypatch, start
):
    blocks = CODE.findall(PAGE.read_text())
    assert len(blocks) == 4
    before = "import signal\nhandlers = [signal.getsignal(n) for n in (2, 15, 10)]\n"
    after = "assert [signal.getsignal(n) for n in (2, 15, 10)] == handlers\n"
    code = "\n".join([before, *blocks, after]).replace("models/smollm2-135m", str(tiny_model))
    (tmp_path / "notes").mkdir()
    for number in range(30):
        text = " ".join(f"note {number} of the mill, line {line}." for line in range(20))
        (tmp_path / "notes" / f"{number}.txt").write_text(text)
    done = start(code, tmp_path, monkeypatch)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = done.stdout.splitlines()[-1]
    assert len(losses.strip("[]").split(",")) == 6
    assert (tmp_path / "runs" / "notes" / "checkpoints").is_dir()
