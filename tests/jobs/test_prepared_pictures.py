"""Drawn pictures from rows to a trained adapter, by the commands alone."""

import json
import os
import subprocess
import sys

import pytest
from pictures import draw
from tiny_vision import save_tiny

TEMPLATE = (
    "{% for m in messages %}{{ 'w30 ' if m.role == 'user' else 'w31 ' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %} w2 {% endfor %}"
)
PREPARE = """
output = "shards"
tokenizer = "model"
sequence_len = 512
shards = 2
evaluation_fraction = 0.2
images = {{ model = "model", folder = "pictures", processor = {{ max_pixels = 12544 }} }}
[[sources]]
name = "drawn"
type = "chat"
path = "rows.jsonl"
chat = {{ template = {template} }}
"""
TRAIN = """
model = "model"
output_dir = "run"
max_steps = 2
threads = 1
vision = { projector = true }
datasets = [{ path = "shards" }]
evaluation_datasets = [{ path = "shards" }]
adapter = { rank = 4, vision = true }
optimizer = { lr = 2e-3 }
"""


@pytest.mark.exhaustive
def test_drawn_pictures_become_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny("qwen2_vl", tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        picture = draw((60 + 9 * number, 80), ("red", "circle"), ("blue", "square"))
        picture.save(tmp_path / f"pictures/{number}.png")
    rows = [
        [
            {"user": ["w10 <image> w11 <image>", f"{n % 8}.png", f"{(n + 1) % 8}.png"]},
            {"assistant": f"w{20 + n} w5"},
        ]
        for n in range(16)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prepare.toml").write_text(PREPARE.format(template=json.dumps(TEMPLATE)))
    (tmp_path / "train.toml").write_text(TRAIN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for command in ("prepare prepare.toml", "verify shards", "train train.toml --gpus 1"):
        line = [sys.executable, "-m", "headrace.jobs.cli", *command.split()]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
