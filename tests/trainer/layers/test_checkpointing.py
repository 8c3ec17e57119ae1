"""Recomputed and offloaded layers change no bit, and hold no more than they say."""

import pytest
import torch
from built_stages import build_stage
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.layer_ranges import recomputed_layers
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.layers.activation_offload import ActivationOffload
from headrace.trainer.layers.layer_functions import (
    LayerFunctions,
    compiled,
    run_layer,
    run_layer_checkpointed,
)
from headrace.trainer.layers.selective_checkpoint import ATTENTION, product_sizes
from headrace.trainer.stage.stage import MicroBatch

CPU = torch.device("cpu")
TOKENS = 48
LAYERS = 5


def build(tiny_model, dropout=0.0, **settings):
    config = TrainConfig.model_validate(
        {
            "model": str(tiny_model),
            "output_dir": "unused",
            "datasets": [{"path": "unused"}],
            "adapter": {"rank": 4, "dropout": dropout, "init": "olora"},
            "optimizer": {"lr": 1e-3},
            **settings,
        }
    )
    return build_stage(config, 0, CPU).stage.train()


@pytest.fixture
def sent(monkeypatch):
    """Grows by one with each tensor that is offloaded."""
    count, send = [], ActivationOffload.send
    monkeypatch.setattr(
        ActivationOffload, "send", lambda self, tensor: count.append(1) or send(self, tensor)
    )
    return count


def gradients(stage):
    """Losses and gradients of two micro-batches that are in flight together, as in a pipeline."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    for number, lengths in enumerate(([48], [20, 28])):
        ids = torch.randint(0, 384, (1, TOKENS), generator=generator)
        batch = MicroBatch([lengths], [TOKENS], ids.roll(-1, 1), 1 / TOKENS, 0.0, seed=number)
        losses.append(stage(ids, batch).value)
    for loss in losses:
        loss.backward()
    found = {name: p.grad for name, p in stage.canonical_parameters().items() if p.requires_grad}
    return torch.stack(losses).detach(), found


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("setting", "offload"),
    [
        ("full", False),
        (2, False),
        ("0,3:4", False),
        ("full", True),
        (2, True),
        ("selective", False),
        ("attention", False),
        ("attention", True),
    ],
)
def test_recomputed_and_offloaded_layers_give_the_same_bits(
    tiny_model, sent, setting, offload, dropout
):
    expected_loss, expected = gradients(build(tiny_model, dropout))
    changed = {"activation_checkpointing": setting, "activation_offload": offload}
    stage = build(tiny_model, dropout, **changed)
    loss, found = gradients(stage)
    assert torch.equal(loss, expected_loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert torch.equal(found[name], gradient), name
    in_layer = 2 if setting == "attention" else 1  # its input, and the result of attention
    assert len(sent) == 2 * sum(stage.recomputed) * offload * in_layer


def test_an_offloaded_input_leaves_the_device_until_it_is_wanted_back():
    offload = ActivationOffload(CPU)
    weight = torch.full((64, 64), 0.1, requires_grad=True)
    offload.begin()
    hidden = torch.randn(8, 64, requires_grad=True)
    kept = []
    for _ in range(3):
        states = hidden * 1.0
        with offload.of(states):
            hidden = states @ weight
        kept.append(states.untyped_storage()._weak_ref())
        del states
    assert all(torch.UntypedStorage._expired(reference) for reference in kept)
    assert offload.last.fetched is None
    hidden.sum().backward()
    assert offload.last.fetched is None, "handed over, not kept"
    assert weight.grad.any()
    for reference in kept:
        torch.UntypedStorage._free_weak_ref(reference)


def test_the_tensor_wanted_next_is_fetched_ahead():
    offload = ActivationOffload(CPU)
    first, second = (offload.send(torch.full((2,), float(value))) for value in (1, 2))
    assert offload.take_back(second).tolist() == [2.0, 2.0]
    assert first.fetched is not None
    assert offload.take_back(first).tolist() == [1.0, 1.0]
    offload.begin()
    assert offload.send(torch.zeros(2)).before is None


@pytest.mark.parametrize(
    ("setting", "layers"),
    [
        ("none", []),
        ("full", [0, 1, 2, 3, 4]),
        (1, [0, 1, 2, 3, 4]),
        (2, [1, 3]),
        ("0,3:4", [0, 3, 4]),
    ],
)
def test_settings_name_layers(setting, layers):
    assert sorted(recomputed_layers(setting, LAYERS)) == layers


def test_a_layer_that_the_model_lacks_is_named(tiny_model):
    with pytest.raises(ConfigError, match=r'"3:5": the model has layers 0 to 4'):
        build(tiny_model, activation_checkpointing="3:5")
    with pytest.raises(ValueError, match='"4:" is no list of layers'):
        build(tiny_model, activation_checkpointing="4:")
    with pytest.raises(ValueError, match='set activation_checkpointing = "full" or drop it'):
        build(tiny_model, activation_offload=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_compiled_layers_offload_as_well(tiny_model, sent):
    _, expected = gradients(build(tiny_model))
    stage = build(tiny_model, activation_checkpointing="full", activation_offload=True)
    again = compiled(run_layer_checkpointed, backend="aot_eager")
    stage.layer_functions = LayerFunctions(run_layer, again)
    _, found = gradients(stage)
    assert len(sent) == 2 * LAYERS
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize("compiles", [False, True])
def test_selective_layers_repeat_every_second_wide_product_and_no_attention(tiny_model, compiles):
    def counted(setting):
        stage = build(tiny_model, activation_checkpointing=setting)
        if compiles:
            torch._dynamo.reset()
            functions = stage.layer_functions
            again = compiled(functions.checkpointed, backend="aot_eager")
            stage.layer_functions = LayerFunctions(functions.plain, again)
        with Products() as products:
            _, found = gradients(stage)
        return products, found

    full, expected = counted("full")
    selective, found = counted("selective")
    none, _ = counted("none")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert full.attention == 4 * LAYERS and selective.attention == none.attention == 2 * LAYERS
    assert none.wide < selective.wide < full.wide


@pytest.mark.parametrize("offload", [False, True])
def test_kept_attention_runs_once_and_all_products_again(tiny_model, offload):
    counts = {}
    for setting in ("none", "attention", "full"):
        offloads = offload and setting != "none"
        stage = build(tiny_model, activation_checkpointing=setting, activation_offload=offloads)
        with Products() as counts[setting]:
            gradients(stage)
    none, attention, full = counts.values()
    assert attention.attention == none.attention == 2 * LAYERS < full.attention
    assert attention.wide == full.wide > none.wide


class Products(TorchDispatchMode):
    """Counts products of a layer's wide weights, and calls of attention, forward ones alone."""

    def __init__(self):
        super().__init__()
        self.wide = self.attention = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.attention += func in ATTENTION
        sizes = product_sizes(func, args)
        self.wide += sizes is not None and sizes[0] >= 2 * sizes[1] and sizes[1] > 4
        return func(*args, **(kwargs or {}))
