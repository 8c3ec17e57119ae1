"""One object for each tuning method, and one record for the rules of its config."""

from contextlib import nullcontext

import pytest
from model_types import architecture_for
from tiny_families import config_of, save_tiny

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.adapter_config import AdapterConfig
from headrace.schemas.train.tuning_methods import TUNING_METHODS
from headrace.trainer.adapters.lora import LoraTuning
from headrace.trainer.adapters.registry import METHODS, method_of
from headrace.trainer.architecture.read_architecture import lay_out, read_architecture
from headrace.trainer.building.make_plan import make_plan

WRITTEN = {  # kind -> how many layers are trained, whether a whole model is written
    "lora": (4, False),
    "dora": (4, False),
    "control": (4, False),
    "blocks": (2, True),
    "none": (4, True),
}


def test_every_record_has_a_class_of_the_same_name():
    assert METHODS.keys() == TUNING_METHODS.keys()


@pytest.mark.parametrize("kind", METHODS)
def test_a_method_marks_what_it_trains_in_a_model_without_memory(tmp_path, kind):
    directory = save_tiny("mistral", tmp_path / "model")
    settings = {"kind": kind} | ({"blocks": 2} if kind == "blocks" else {})
    config = config_of(directory, 1, settings)
    plan = make_plan(config, read_architecture(directory))
    layers, whole = WRITTEN[kind]
    trained = [name for name, p in plan.model.named_parameters() if p.requires_grad]
    prefix = f"{plan.prefix}model.layers."
    assert isinstance(plan.method, method_of(config.adapter))
    assert len({n.removeprefix(prefix).split(".")[0] for n in trained if "layers" in n}) == layers
    assert plan.method.trains_base == whole
    assert all(parameter.is_meta for parameter in plan.model.parameters())


def test_adapters_that_peft_would_lose_when_it_loads_them_are_refused_by_name():
    """laguna: transformers' renaming of `mlp.shared_expert.` also matches `mlp.shared_experts`."""
    for model_type, lost in (("laguna", True), ("qwen2_moe", False)):
        architecture = architecture_for(model_type, tiny=True)
        config = AdapterConfig(kind="lora", rank=4)
        method = LoraTuning(config, architecture, lay_out(architecture), model_type, 0)
        with pytest.raises(ConfigError, match=r"lose .*shared_experts") if lost else nullcontext():
            method.check_result()
