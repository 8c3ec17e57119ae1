"""Small vision models with their tokenizers, drawn pictures, and configs over both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictures import COLORS, SHAPES, draw
from vision_models import write_vision_model

from headrace.schemas.prepare.prepare_config import PrepareConfig

KINDS = [(color, shape) for color in COLORS for shape in SHAPES]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve drawn pictures of several sizes in `pictures/` of the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        left, right = KINDS[number % 6], KINDS[(number * 5 + 1) % 6]
        draw((60 + 9 * number, 90 - 3 * number), left, right).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def model(pictures: Path) -> Callable[[str], str]:
    """The directory of a small model of a family."""

    def model(name: str = "qwen2_vl") -> str:
        folder = pictures.parent / name
        if not folder.exists():
            write_vision_model(folder, name)
        return str(folder)

    return model


@pytest.fixture
def config(model: Callable[[str], str]) -> Callable[..., PrepareConfig]:
    """A config over `rows.jsonl`, or other sources."""

    def config(
        output: str = "out",
        family: str = "qwen2_vl",
        images: dict[str, Any] | None = None,
        **changes: Any,
    ) -> PrepareConfig:
        values: dict[str, Any] = {
            "output": output,
            "tokenizer": model(family),
            "sequence_len": 256,
            "shards": 2,
            "evaluation_fraction": 0.0,
            "max_reject_fraction": 1.0,
            "images": {"model": model(family), "folder": "pictures", **(images or {})},
            "sources": [{"name": "drawn", "type": "chat", "path": "rows.jsonl"}],
        }
        return PrepareConfig.model_validate(values | changes)

    return config


@pytest.fixture
def write_rows(pictures: Path) -> Callable[..., None]:
    """Writes JSONL into the working directory."""

    def write_rows(rows: list[Any], name: str = "rows.jsonl") -> None:
        (pictures.parent / name).write_text("\n".join(map(json.dumps, rows)))

    return write_rows
