"""Every family in stages gives transformers' losses and gradients, each document read alone."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_families import (
    FAMILIES,
    build,
    config_of,
    gradients_of,
    make_batch,
    reference_loss,
    run_stages,
    save_tiny,
)
from transformers import AutoModelForCausalLM

from headrace.trainer.model.adapters import file_name
from headrace.trainer.model.families import FAMILIES as KNOWN

TOLERANCE = 1e-5
MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model directories, made when first asked for."""
    directory, made = tmp_path_factory.mktemp("families"), {}

    def get(family):
        if family not in made:
            made[family] = save_tiny(family, directory / family)
        return made[family]

    return get


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loaded(directory):
    attention = "eager" if "gemma2" in directory.name else "sdpa"
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    )


def relative(ours, reference):
    """Largest difference over the tensor, relative to its norm."""
    return float(torch.linalg.vector_norm(ours - reference) / torch.linalg.vector_norm(reference))


def expected_loss(model, config, batch):
    """transformers' loss, with the routers' part if the model has routers."""
    if config.model_type not in MIXTURES:
        return reference_loss(model, batch)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    module = sys.modules[type(base).__module__]
    return reference_loss(model, batch, config.router_aux_loss_coef, module)


def full(directory, stages):
    """Largest relative differences of loss and gradients in full fine-tuning."""
    batch, reference = make_batch(), loaded(directory)
    expected, router = expected_loss(reference, reference.config, batch)
    expected.backward()
    built = build(config_of(directory, stages))
    loss, _, router_loss = run_stages(built, batch)
    ours = gradients_of(built)
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    assert ours.keys() == theirs.keys()
    assert router_loss == pytest.approx(float(torch.as_tensor(router).detach()), rel=TOLERANCE)
    gradient = max(relative(ours[name], theirs[name]) for name in theirs)
    return abs(loss - expected.item()) / abs(expected.item()), gradient


def lora(directory, stages, **adapter):
    """The same with adapters, against PEFT."""
    from peft import get_peft_model

    batch = make_batch()
    built = build(config_of(directory, stages, {"kind": "lora", "rank": 4, **adapter}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in built:
            for item in part.trained:
                item.parameter.add_(0.05 * torch.randn(item.parameter.shape, generator=generator))
    model = loaded(directory)
    config = model.config
    reference = get_peft_model(model, built[0].lora_config)
    theirs = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    values = {item.name: item.parameter for part in built for item in part.trained}
    assert values.keys() == theirs.keys()
    assert {file_name(name) for name in values}  # every name has a place in PEFT's file
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(values[name])
    expected, _ = expected_loss(reference, config, batch)
    expected.backward()
    loss, _, _ = run_stages(built, batch)
    ours = gradients_of(built)
    gradient = max(relative(ours[name], p.grad) for name, p in theirs.items())
    return abs(loss - expected.item()) / abs(expected.item()), gradient


MODES = {"full": full, "LoRA": lora}
SHORT = {("full", 2), ("LoRA", 3)}  # the rest is `make exhaustive`, which also covers one stage
CELLS = [
    pytest.param(mode, stages, marks=[] if (mode, stages) in SHORT else [pytest.mark.exhaustive])
    for mode in MODES
    for stages in (1, 2, 3)
]


@pytest.mark.parametrize(("mode", "stages"), CELLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_transformers_own(models, family, mode, stages):
    loss, gradient = MODES[mode](models(family), stages)
    assert loss <= TOLERANCE
    assert gradient <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_one_stage_is_transformers_own_as_well(models, mode):
    loss, gradient = MODES[mode](models("gemma2"), 1)
    assert loss <= TOLERANCE
    assert gradient <= TOLERANCE


def test_the_table_in_the_docs_names_every_family():
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    assert sorted(FAMILIES) == sorted(KNOWN)
    for family in FAMILIES:
        assert f"| {family} |" in page, "run tests/trainer/families_table.py"
