"""The faster parts compute what transformers and PEFT do, under the same names, compiled once."""

import copy
from functools import partial

import pytest
import torch
from built_stages import build_stage
from tiny_families import (
    FAMILIES,
    build,
    config_of,
    gradients_of,
    make_batch,
    run_stages,
    save_tiny,
)
from torch._dynamo.testing import CompileCounterWithBackend

from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.architecture.families import FAMILIES as RECORDS
from headrace.trainer.layers.layer_functions import (
    LayerFunctions,
    compiled,
    run_layer,
    run_layer_checkpointed,
)
from headrace.trainer.layers.lora_layers import LoraLinear, swap_adapters
from headrace.trainer.layers.norms import RmsNorm, faster_norm, swap_norms
from headrace.trainer.layers.rotary_attention import RotaryAttention, swap_attention
from headrace.trainer.stage.micro_batch import MicroBatch

CPU = torch.device("cpu")
TOKENS = 48


@pytest.fixture(params=["none", "full"], ids=["kept", "recomputed"])
def stage(request, tiny_model):
    """A whole model as one stage, its adapters away from zero."""
    config = TrainConfig.model_validate(
        {
            "model": str(tiny_model),
            "output_dir": "unused",
            "activation_checkpointing": request.param,
            "datasets": [{"path": "unused"}],
            "adapter": {"rank": 4, "alpha": 8},
            "optimizer": {"lr": 1e-3},
        }
    )
    built = build_stage(config, 0, CPU).stage.train()
    generator = torch.Generator().manual_seed(3)
    for name, weight in built.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(0, 0.05, generator=generator)
    return built


def micro_batch(lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(0, 384, (1, TOKENS), generator=generator)
    return ids, MicroBatch([lengths], [TOKENS], ids.roll(-1, 1), 1 / TOKENS, 0.0, seed=0)


def run(stage, lengths):
    """Loss and gradients by name of a micro-batch, with another one in flight as in a pipeline."""
    if stage.before_step is not None:
        stage.before_step()
    stage.zero_grad()
    loss = stage(*micro_batch(lengths)).value
    stage(*micro_batch(lengths))
    loss.backward()
    gradients = {
        name: weight.grad
        for name, weight in stage.canonical_parameters().items()
        if weight.requires_grad
    }
    return loss.detach(), gradients


def swap(stage):
    """As `accelerate` does on a GPU."""
    adapters = [
        part
        for layer, again in zip(stage.layers, stage.recomputed, strict=True)
        for part in swap_adapters(layer, may_join=not again)
    ]
    stage.before_step = partial(LoraLinear.refresh, adapters)


def test_swapped_adapters_keep_their_names_and_results(stage):
    swapped = copy.deepcopy(stage)
    swap(swapped)
    layers = [module for module in swapped.modules() if isinstance(module, LoraLinear)]
    assert len(layers) == 5 * 7
    joined = sum(layer.joined is not None for layer in layers)
    assert joined == (0 if any(stage.recomputed) else 5 * 2)  # gate and up
    shared = sum(layer.group is not None for layer in layers)
    assert shared == (0 if any(stage.recomputed) else 5 * 3)  # q, k and v
    for model in (swapped, stage):  # as an optimizer does, after the layers were swapped
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.data += 0.01
    loss, gradients = run(swapped, [20, 28])
    expected_loss, expected = run(stage, [20, 28])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert list(gradients) == list(expected)
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_compiled_layers_compute_the_same_and_are_compiled_once(stage):
    counter = CompileCounterWithBackend("aot_eager" if any(stage.recomputed) else "eager")
    faster = copy.deepcopy(stage)
    swap(faster)
    faster.layer_functions = LayerFunctions(
        compiled(run_layer, backend=counter), compiled(run_layer_checkpointed, backend=counter)
    )
    compared = [[20, 28], [48], [5, 5, 38], [1] * 48]
    for lengths in compared:
        loss, gradients = run(faster, lengths)
        expected_loss, expected = run(stage, lengths)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)
    # with a mask and without; the first layer, whose input needs no gradient, and the four others
    assert counter.frame_count == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_record_names_its_norms_and_the_layers_that_write(family, tmp_path):
    built = build(config_of(save_tiny(family, tmp_path / family)))
    record, layer = built[0].architecture.family, built[0].stage.layers[0]
    has_rms_norm = any(type(part).__name__.endswith("RMSNorm") for part in layer.modules())
    assert has_rms_norm == (record.rms_norm is not None)
    if built[0].architecture.router is None:  # adapters that are folded go to no experts
        width = built[0].architecture.config.hidden_size
        assert [layer.get_submodule(name).out_features for name in record.outputs] == [
            width for _ in record.outputs
        ]


RMS_NORM = sorted(name for name in FAMILIES if RECORDS[name].rms_norm is not None)


@pytest.mark.parametrize("family", RMS_NORM)
def test_norms_and_attention_of_ours_compute_the_same_in_every_family(family, tmp_path):
    built = build(config_of(save_tiny(family, tmp_path / family)))
    batch, stage, record = make_batch(), built[0].stage, built[0].architecture.family
    names, (expected_loss, *_) = list(stage.canonical_parameters()), run_stages(built, batch)
    expected = {name: gradient.clone() for name, gradient in gradients_of(built).items()}
    stage.zero_grad()
    stage.norm = faster_norm(stage.norm, record.rms_norm)
    for layer in stage.layers:
        swap_norms(layer, record.rms_norm)
        if record.llama_attention:
            swap_attention(layer, "self_attn")
    assert isinstance(stage.norm, RmsNorm)
    assert not any(type(part).__name__.endswith("RMSNorm") for part in stage.layers[0].modules())
    swapped = [part for part in stage.modules() if isinstance(part, RotaryAttention)]
    assert len(swapped) == (len(stage.layers) if record.llama_attention else 0)
    loss, *_ = run_stages(built, batch)
    assert list(stage.canonical_parameters()) == names
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in gradients_of(built).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
