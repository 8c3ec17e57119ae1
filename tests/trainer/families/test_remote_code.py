"""Models whose code lies in their directory: run only if the config asks for it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from saved_parts import saved_adapter, step
from tiny_families import build, config_of, make_batch, reference_loss, run_forward
from transformers import AutoConfig, AutoModelForCausalLM
from variants import differences

from headrace.schemas.errors import ConfigError
from headrace.trainer.export.merge import merge
from headrace.trainer.families.remote_code import run_code_of

CODE = Path(__file__).parents[2] / "support" / "remote_models"
CLASSES = {
    "AutoConfig": "configuration_reduced.ReducedConfig",
    "AutoModelForCausalLM": "modeling_reduced.ReducedForCausalLM",
}


@pytest.fixture(autouse=True)
def code_cache(tmp_path, monkeypatch):
    """Keep transformers' copies of code out of the home directory."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.syspath_prepend(str(tmp_path / "c"))


def described(directory, model_type="reduced", **classes):
    """A directory with code and config.json, without weights."""
    directory.mkdir()
    for path in CODE.glob("*.py"):
        shutil.copy(path, directory)
    settings = {"model_type": model_type, "auto_map": {**CLASSES, **classes}}
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def with_weights(directory):
    """The same with weights, as its own code makes them."""
    run_code_of(described(directory))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    settings = (directory / "config.json").read_text()
    model.save_pretrained(directory)
    (directory / "config.json").write_text(settings)
    return directory


def test_a_model_with_its_own_code_is_trained_merged_and_read_as_transformers_does(tmp_path):
    base, batch = with_weights(tmp_path / "base"), make_batch()
    assert max(differences(base, 2, "full")) <= 1e-5
    built = build(config_of(base, 2, {"rank": 4}, trust_remote_code=True))
    step(built)
    expected = run_forward(built, batch)[-1].value.item()
    merge(base, saved_adapter(built, tmp_path / "adapter"), tmp_path / "merged")
    assert {path.name for path in CODE.glob("*.py")} < {
        p.name for p in (tmp_path / "merged").iterdir()
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert float(reference_loss(model, batch)[0]) == pytest.approx(expected, rel=1e-5)


def test_code_is_not_run_unless_the_config_asks_for_it(tmp_path):
    directory = described(tmp_path / "model", "never_registered")
    (directory / "configuration_reduced.py").write_text("raise RuntimeError('it was run')")
    with pytest.raises(ConfigError, match="read it, and if you trust it, set trust_remote_code"):
        build(config_of(directory))
    with pytest.raises(ConfigError, match=r"its code cannot be run .*RuntimeError: it was run"):
        build(config_of(directory, trust_remote_code=True))


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        ({"AutoConfig": "other/repository--configuration.Config"}, "is not in"),
        ({"AutoConfig": "configuration_missing.Config"}, "is not in"),
        ({"AutoModelForCausalLM": None}, "names no AutoModelForCausalLM; drop the key"),
    ],
)
def test_code_that_is_elsewhere_or_not_there_is_refused(tmp_path, classes, reason):
    directory = described(tmp_path / "model", "never_registered", **classes)
    with pytest.raises(ConfigError, match=reason):
        build(config_of(directory, trust_remote_code=True))
