"""All that depends on whose accelerator it is stands in one file."""

import io
import tokenize
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from headrace.trainer import devices

ROOT = Path(__file__).parents[2]
PACKAGES = ("trainer", "kernels", "schemas", "dataprep", "jobs")
MAKERS = ("cuda", "nccl", "cudart", "xpu", "npu", "hccl", "xccl")


def strays(source):
    """Names and texts of code that name a maker's device or library; comments do not count."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string
        if token.type == tokenize.NAME and any(part in MAKERS for part in text.lower().split("_")):
            yield token.string
        if token.type == tokenize.STRING and text.strip("rbf'\"") in MAKERS:
            yield token.string


def test_no_other_file_names_a_makers_device():
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    assert len(files) > 300
    found = {str(path.relative_to(ROOT)): list(strays(path.read_text())) for path in files}
    named = {path: names for path, names in found.items() if names}
    assert list(named) == ["trainer/devices.py"], named


def test_strays_are_seen():
    source = 'x.is_cuda; torch.cuda.synchronize(); torch.device("cuda"); "nccl"  # cuda\n'
    assert list(strays(source)) == ["is_cuda", "cuda", '"cuda"', '"nccl"']


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_a_cpu_has_no_streams_and_copies_at_once():
    device = devices.take_device(local_rank=3)
    assert device == torch.device("cpu")
    assert (devices.device_type(), devices.count_accelerators()) == ("cpu", 0)
    assert devices.new_stream(device) is devices.record_event(device) is None
    assert devices.peak_memory() is devices.compute_capability(device) is None
    assert devices.COLLECTIVES[device.type] == "gloo"
    assert devices.group_options("cpu", None) is None
    tensor = torch.ones(3)
    assert devices.pin(tensor) is tensor
    assert not devices.registered_memory(8, device).is_pinned()
    devices.synchronize(device)
    with devices.on_stream(devices.new_stream(device)):
        pass


class OtherMaker:
    """As much of torch's module for a device as is asked for."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments, **named):
            self.calls.append(name)
            return {"device_count": 2, "max_memory_allocated": 7, "is_available": True}.get(name)

        return call

    def get_device_properties(self, index):
        return SimpleNamespace(total_memory=100 - index, name=f"card {index}")

    def stream(self, stream):
        return nullcontext(stream)

    def Event(self, enable_timing):  # noqa: N802 (torch's name)
        return SimpleNamespace(record=lambda: self.calls.append(("record", enable_timing)))


def test_another_makers_accelerator_is_asked_by_its_own_module(monkeypatch):
    other = OtherMaker()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: other)
    assert devices.take_device(1) == torch.device("xpu", 1)
    assert (devices.count_accelerators(), devices.peak_memory()) == (2, 7)
    assert devices.smallest_memory() == (99, "card 1")
    assert devices.record_event(torch.device("xpu", 1), timed=True) is not None
    devices.synchronize(torch.device("xpu", 1))
    assert {"set_device", "synchronize", ("record", True)} <= set(other.calls)
    assert devices.COLLECTIVES["xpu"] == "xccl"
    assert devices.group_options("xpu", None) is None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert devices.device_type() == "cpu", "processes cannot talk over it"
