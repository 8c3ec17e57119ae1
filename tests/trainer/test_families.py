"""Every family in stages gives transformers' losses and gradients, each document read alone."""

import sys

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

from headrace.trainer.adapters import file_name

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model directories, made when first asked for."""
    directory, made = tmp_path_factory.mktemp("families"), {}

    def get(family):
        if family not in made:
            made[family] = save_tiny(family, directory / family)
        return made[family]

    return get


def loaded(directory):
    attention = "eager" if "gemma2" in directory.name else "sdpa"
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    )


def relative(ours, reference):
    """Largest difference over the tensor, relative to its norm."""
    return float(torch.linalg.vector_norm(ours - reference) / torch.linalg.vector_norm(reference))


def expected_loss(model, config, batch):
    coefficient = (
        getattr(config, "router_aux_loss_coef", 0.0)
        if "moe" in config.model_type or (config.model_type == "mixtral")
        else 0.0
    )
    module = sys.modules[type(getattr(model, "base_model", model)).__module__]
    if hasattr(model, "peft_config"):
        module = sys.modules[type(model.get_base_model()).__module__]
    return reference_loss(model, batch, coefficient, module)


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_transformers_own(models, family, stages, mode):
    loss, gradient = MODES[mode](models(family), stages)
    assert loss <= TOLERANCE
    assert gradient <= TOLERANCE
