"""Weights that are held in host memory change no bit, and no more than two layers' are back."""

import mmap
from types import SimpleNamespace

import pytest
import torch
from runs import checkpoint_tensors, exact_metrics
from tiny_families import (
    build,
    config_of,
    go_back,
    gradients_of,
    make_batch,
    run_forward,
    run_micro_batch,
    run_stages,
    save_tiny,
)

from headrace.schemas.errors import ConfigError
from headrace.trainer.batches.extras import Extras
from headrace.trainer.devices import registered_memory
from headrace.trainer.layers.layer_functions import LayerFunctions, compiled, run_layer
from headrace.trainer.layers.weight_offload import PLACES, WeightOffload
from headrace.trainer.stage.micro_batch import MicroBatch

LORA = {"kind": "lora", "rank": 2, "init": "olora"}  # starts with gradients everywhere
PLAIN_LORA = {"kind": "lora", "rank": 2}
EXPERT_LORA = {**PLAIN_LORA, "target_parameters": "experts"}
NF4 = {"backend": "bnb", "double_quantization": True}
HQQ = {"backend": "hqq", "group_size": 8}
INT8 = {"backend": "bnb", "type": "int8"}


def long(*values):
    """A combination for the exhaustive tests."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    return {name: save_tiny(name, folder / name) for name in ("llama", "mixtral", "gemma2")}


@pytest.fixture
def fetched(monkeypatch):
    """Numbers of the layers that are copied to the device, in order."""
    numbers, fetch = [], WeightOffload._fetch

    def note(self, position):
        if self.held[position % PLACES] != self.order[position]:
            numbers.append(self.order[position])
        return fetch(self, position)

    monkeypatch.setattr(WeightOffload, "_fetch", note)
    return numbers


def in_flight_together(built):
    """Losses and gradients of two micro-batches, both forward before either goes back."""
    batch, losses = make_batch(), []
    runs = []
    for seed in (1, 2):
        inputs = []
        runs.append((run_forward(built, batch, seed, inputs), inputs))
    for outputs, inputs in runs:
        losses.append(outputs[-1].value.item())
        go_back(outputs, inputs)
    return losses, gradients_of(built)


@pytest.mark.parametrize(
    ("family", "wish", "settings"),
    [
        ("llama", "mlp", {}),
        long("llama", "mlp", {"activation_checkpointing": "full"}),
        ("llama", "mlp", {"activation_checkpointing": 2, "activation_offload": True}),
        long("llama", "mlp", {"quantization": NF4}),
        ("llama", "mlp", {"quantization": NF4, "activation_checkpointing": "full"}),
        long("llama", "mlp", {"quantization": INT8, "adapter": PLAIN_LORA}),
        ("llama", "mlp", {"quantization": HQQ, "adapter": PLAIN_LORA}),
        long("llama", "mlp", {"adapter": {"kind": "dora", "rank": 2, "dropout": 0.1}}),
        ("mixtral", "experts", {"adapter": PLAIN_LORA}),
        long("mixtral", "mlp", {"adapter": EXPERT_LORA, "activation_checkpointing": "full"}),
        long("mixtral", "experts", {"adapter": EXPERT_LORA, "quantization": NF4}),
        long("gemma2", "mlp", {"adapter": {"kind": "control", "rank": 2}}),
    ],
)
@pytest.mark.parametrize("stages", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_offloaded_weights_give_the_same_bits(models, fetched, family, wish, settings, stages):
    settings = {"adapter": LORA, **settings}
    outcomes = []
    for where in ("none", wish):
        built = build(config_of(models[family], stages, weight_offload=where, **settings))
        if settings["adapter"]["kind"] == "control":
            outcomes.append((run_controlled(built), gradients_of(built)))
        else:
            outcomes.append(in_flight_together(built))
    (expected_losses, expected), (losses, gradients) = outcomes
    assert losses == expected_losses
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name
    assert any(gradient.any() for gradient in expected.values())
    assert len(fetched) >= 4, "each layer came at least once"


def run_controlled(built):
    """One micro-batch of both classes."""
    batch = make_batch()
    classes = torch.ones_like(batch.ids, dtype=torch.int8)
    classes[0] = -1
    micro_batch = MicroBatch(
        batch.document_lengths,
        batch.row_lengths,
        batch.labels,
        1 / batch.trained_tokens,
        0.0,
        seed=0,
        extras=Extras(control_classes=classes),
    )
    return [
        output.value.detach().sum().item()
        for output in run_micro_batch(built, batch.ids, micro_batch)
    ]


def test_two_layers_weights_are_all_that_the_device_has(models):
    (built,) = build(config_of(models["llama"], 1, LORA, weight_offload="mlp"))
    offload = built.stage.weight_offload
    hosts = offload.source.held
    assert len(hosts) == 4
    largest = max(host.nbytes for host in hosts.values())
    assert sum(place.nbytes for place in offload.places) == PLACES * largest
    places = {place.untyped_storage().data_ptr() for place in offload.places}
    for name, weight in built.stage.canonical_parameters().items():
        if ".mlp." in name and ".lora_" not in name:
            assert weight.untyped_storage().data_ptr() in places, name
    run_stages([built], make_batch())
    kept = {place.untyped_storage().data_ptr() for place in offload.places}
    assert kept == places


def test_nothing_of_the_weights_is_kept_for_the_backward_pass(models):
    """Autograd holds views of the two places, whichever layer they hold now."""
    settings = {"quantization": NF4, "weight_offload": "mlp"}
    (built,) = build(config_of(models["llama"], 1, PLAIN_LORA, **settings))
    offload = built.stage.weight_offload
    output = run_forward([built], make_batch())[-1]
    assert offload.held == [2, 3]
    for place in offload.places:
        place.fill_(255)  # what a layer of another micro-batch would leave there
    offload.held = [None, None]
    output.value.backward()
    (other,) = build(config_of(models["llama"], 1, PLAIN_LORA, quantization=NF4))
    run_forward([other], make_batch())[-1].value.backward()
    expected = gradients_of([other])
    for name, gradient in gradients_of([built]).items():
        assert torch.equal(gradient, expected[name]), name


def test_the_next_layer_comes_ahead_in_both_directions(models, fetched):
    (built,) = build(config_of(models["llama"], 1, LORA, weight_offload="mlp"))
    offload = built.stage.weight_offload
    offload.bring(0)
    assert offload.held == [0, 1]
    offload.bring(1)
    assert offload.held == [2, 1]
    offload.bring(2)
    offload.bring(3)
    assert offload.held == [2, 3]
    offload.bring(2)
    assert offload.held == [2, 1]
    offload.bring(1)
    assert offload.held == [0, 1]
    assert fetched == [0, 1, 2, 3, 1, 0]


def test_evaluation_brings_weights_as_well(models):
    batch, losses = make_batch(), []
    for where in ("none", "mlp"):
        built = build(config_of(models["llama"], 2, LORA, weight_offload=where))
        for part in built:
            part.stage.eval()
        with torch.no_grad():
            losses.append(run_forward(built, batch)[-1].token_losses)
    assert torch.equal(*losses)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize("recompute", [long("none"), "full"])
def test_compiled_layers_get_their_weights_as_well(models, recompute):
    found = []
    for where in ("none", "mlp"):
        settings = {"weight_offload": where, "activation_checkpointing": recompute}
        built = build(config_of(models["llama"], 1, LORA, **settings))
        once = compiled(run_layer, backend="aot_eager")
        built[0].stage.layer_functions = LayerFunctions(once, once)
        run_stages(built, make_batch())
        found.append(gradients_of(built))
    expected, gradients = found
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": {"kind": "none"}}, 'adapter.kind = "none" trains and writes the weights'),
        (
            {"adapter": PLAIN_LORA, "relora": {"every_steps": 50}},
            "leaves weights as they are, and relora.every_steps adds to them",
        ),
    ],
)
def test_weights_that_change_are_not_offloaded(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of("unused", 1, weight_offload="mlp", **settings)


def test_a_model_without_experts_is_told_so(models):
    with pytest.raises(ConfigError, match='weight_offload = "experts": the layers of this model'):
        build(config_of(models["llama"], 1, LORA, weight_offload="experts"))


def test_a_single_stage_offloads_as_two_do(models):
    found = []
    for stages in (1, 2):
        settings = {"weight_offload": "mlp", "activation_checkpointing": 2}
        built = build(config_of(models["gemma2"], stages, LORA, **settings))
        found.append(in_flight_together(built))
    (expected_losses, expected), (losses, gradients) = found
    assert losses == expected_losses
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


@pytest.mark.slow
def test_a_run_over_two_processes_is_the_same_with_its_weights_in_host_memory(training):
    """Through DeepSpeed, which moves a stage's modules to the device."""
    settings = {"pipeline_stages": 2, "max_steps": 3}
    plain = training.run("plain", 2, **settings)
    changes = {"weight_offload": "mlp", "embedding_on_cpu": True}
    offloaded = training.run("offloaded", 2, **settings, **changes)
    assert exact_metrics(offloaded) == exact_metrics(plain)
    ours, expected = checkpoint_tensors(offloaded), checkpoint_tensors(plain)
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_pinned_memory_has_pages_of_its_own_and_is_unregistered_when_it_is_gone(monkeypatch):
    registered = {}
    cuda = SimpleNamespace(
        cudaHostRegister=lambda address, size, _: registered.update({address: size}) or 0,
        cudaHostUnregister=registered.pop,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    gpu = torch.device("cuda")
    first, second = registered_memory(5000, gpu), registered_memory(5000, gpu)
    assert all(address % mmap.PAGESIZE == 0 for address in registered)
    assert sorted(registered) == sorted([first.data_ptr(), second.data_ptr()])
    second.fill_(7)
    del first
    assert registered == {second.data_ptr(): 5000}
    assert second.sum() == 35000
