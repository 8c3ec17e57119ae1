"""The modes of training in which each family is compared with transformers."""

import sys
from functools import partial

import pytest
import torch
from tiny_families import (
    build,
    config_of,
    gradients_of,
    make_batch,
    reference_loss,
    run_stages,
)
from transformers import AutoModelForCausalLM

from headrace.trainer.adapters.names import base_name, file_name
from headrace.trainer.quantized.modules import quantized_places, quantized_weights_of

TOLERANCE = 1e-5


MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}


def loaded(directory):
    eager = any(family in directory.name for family in ("gemma2", "gpt_oss"))
    attention = "eager" if eager else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    )
    return model.float()  # of quantized files transformers leaves some in other types


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


def with_adapters(directory, stages, quantization=None, **adapter):
    """The stages of a model, with adapters that do something."""
    config = config_of(directory, stages, {"rank": 4, **adapter}, quantization=quantization)
    built = build(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in built:
            for item in part.trained:
                item.parameter.add_(0.05 * torch.randn(item.parameter.shape, generator=generator))
    return built


def lora(directory, stages, **settings):
    """The same with adapters, against PEFT, over the same numbers if the weights are quantized."""
    from peft import get_peft_model

    batch = make_batch()
    built = with_adapters(directory, stages, **settings)
    model = loaded(directory)
    config = model.config
    put_dequantized(built, model)
    reference = get_peft_model(model, built[0].method.peft)
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


def put_dequantized(built, model):
    """Give transformers' model the numbers that our quantized weights stand for."""
    for part in built:
        for name, held, attribute in quantized_places(part.stage.names):
            model.get_parameter(base_name(name)).data = held.dequantized(attribute)


def quantized(directory, stages, **quantization):
    """With adapters over quantized weights: against PEFT, and bit by bit against one stage."""
    batch, settings = make_batch(), {"quantization": quantization}
    one, several = (with_adapters(directory, count, **settings) for count in (1, stages))
    assert sum(len(list(quantized_weights_of(part.stage.names))) for part in several) >= 16
    tokens, gradients = [], []
    for built in (one, several):
        tokens.append(run_stages(built, batch)[1])
        gradients.append(gradients_of(built))
    assert torch.equal(*tokens)
    assert all(torch.equal(gradients[1][name], value) for name, value in gradients[0].items())
    return lora(directory, stages, **settings)


MODES = {
    "full": full,
    "LoRA": lora,
    "NF4": partial(quantized, backend="bnb", double_quantization=True),
    "HQQ": partial(quantized, backend="hqq"),
}
