"""Runs in different layouts, compared to rounding."""

import shutil

import pytest
from runs import read_metrics

PACKED = {"loader__pack": "best_fit", "loader__tokens_per_row": 96, "adapter__dropout": 0.0}


def assert_alike(run, reference):
    """Rows in the same order, losses to 1e-6, gradients and statistics to 1e-5, relative."""
    for line, other in zip(read_metrics(run), read_metrics(reference), strict=True):
        for name in ("kind", "step", "rows_sha256", "tokens", "trained_tokens"):
            assert line.get(name) == other.get(name)
        found, expected = numbers(line), numbers(other)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            tolerance = 1e-6 if "loss" in name else 1e-5
            least = 1e-6 if name in (line.get("pairs") or {}) else 0.0  # differences around 0
            near = pytest.approx(value, rel=tolerance, abs=least)
            assert found[name] == near, (name, line["step"])


def numbers(line):
    """What must be the same in any layout, by name."""
    names = ("loss", "cross_entropy", "router_loss", "gradient_norm")
    found = {name: line[name] for name in names if line.get(name) is not None}
    found |= {f"loss of {name}": value for name, value in line["source_losses"].items()}
    found |= line.get("pairs") or {}
    summary = line.get("token_summary") or {}
    means = ("entropy", "likelihood", "perplexity", "top5_accuracy", "hidden_norm")
    return found | {name: summary[name] for name in means if summary}


def forget_after(run, step):
    for path in (run / "checkpoints").glob("step-*"):
        if path.name > f"step-{step:06d}":
            shutil.rmtree(path)
