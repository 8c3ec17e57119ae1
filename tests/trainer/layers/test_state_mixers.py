"""Layers with a state within stages: recomputed, as a reference, and told of documents as masks."""

import pytest
import torch
from model_types import architecture_for
from tiny_families import config_of, make_batch, run_forward

from headrace.trainer.architecture.read_architecture import read_architecture
from headrace.trainer.building.make_plan import make_plan
from headrace.trainer.building.model_builder import build_stage
from headrace.trainer.building.self_check import save_tiny
from headrace.trainer.layers.state_mixers import RestartsAtDocuments
from headrace.trainer.quantized.modules import quantized_places
from headrace.trainer.stage.stage import MicroBatch

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A model with delta nets, attention and experts."""
    directory = tmp_path_factory.mktemp("hybrid")
    save_tiny(architecture_for("qwen3_next", tiny=True), directory)
    return directory


def build(directory, **settings):
    """The whole model as one stage, without the trial of its type."""
    config = config_of(directory, 1, {"rank": 4}, router_loss=0.0, **settings)
    built = build_stage(config, 0, CPU, make_plan(config, read_architecture(directory)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for item in built.trained:
            item.parameter.add_(0.05 * torch.randn(item.parameter.shape, generator=generator))
    return built


def gradients(built):
    """Losses and gradients of two micro-batches in flight together, of other documents each."""
    generator, losses = torch.Generator().manual_seed(1), []
    for number, lengths in enumerate(([24], [9, 11, 4])):
        ids = torch.randint(3, 97, (1, 24), generator=generator)
        batch = MicroBatch([lengths], [20], ids.roll(-1, 1), 1 / 24, 0.0, seed=number)
        losses.append(built.stage.train()(ids, batch).value)
    for loss in losses:
        loss.backward()
    return [loss.detach() for loss in losses] + [item.parameter.grad for item in built.trained]


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputed_layers_change_no_bit(hybrid, kind):
    kept = gradients(build(hybrid))
    again = gradients(build(hybrid, activation_checkpointing=kind))
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    assert all(value.abs().sum() > 0 for value in kept)


def test_a_reference_is_the_model_without_adapters(hybrid):
    batch = make_batch()
    built = build(hybrid, objective={"kind": "dpo"})
    plain = build(hybrid)
    with torch.no_grad():
        for item in plain.trained:
            item.parameter.zero_()
        micro = MicroBatch(batch.document_lengths, batch.row_lengths, None, 1.0, 1.0, seed=0)
        found, _ = built.stage.reference.run(batch.ids, micro)
        expected, _ = plain.stage.eval().run(batch.ids, micro)
        adapted, _ = built.stage.eval().run(batch.ids, micro)
    assert torch.equal(found, expected)
    assert not torch.allclose(adapted, expected, rtol=1e-3)


def test_mixers_keep_their_class_and_attention_stays_as_it_is(hybrid):
    built = build(hybrid)
    mixers = [part for part in built.stage.modules() if isinstance(part, RestartsAtDocuments)]
    assert {type(mixer).__name__ for mixer in mixers} == {"Qwen3NextGatedDeltaNet"}
    assert len(mixers) == sum(built.stage.stateful) < len(built.stage.layers)
    assert len(run_forward([built], make_batch())[-1].token_losses) == 3


def test_mamba_gets_adapters_and_formats_where_its_layers_are_called(tmp_path):
    save_tiny(architecture_for("mamba", tiny=True), tmp_path)
    built = build(tmp_path, quantization={"backend": "bnb"})
    adapted = {item.name.split(".lora_")[0].rsplit(".", 1)[-1] for item in built.trained}
    assert adapted == {"in_proj", "x_proj"}
    places = [place for place, _, _ in quantized_places(built.names)]
    assert any("x_proj" in place for place in places)
    assert not any("dt_proj" in place for place in places)
    assert run_forward([built], make_batch())[-1].value.item() > 0
    parts = built.stage.train().modules()
    mixer = next(part for part in parts if isinstance(part, RestartsAtDocuments))
    assert not mixer.training
    assert mixer.in_proj.training
