"""What a GPU runs, attention by bounds and compiled layers, is the plain twin in every family."""

import pytest
import torch
from model_types import architecture_for
from tiny_families import (
    DISCOVERED,
    FAMILIES,
    build,
    config_of,
    gradients_of,
    make_batch,
    run_stages,
    save_tiny,
)
from torch._dynamo.testing import CompileCounterWithBackend

from headrace.trainer.building import self_check
from headrace.trainer.layers.document_attention import NAME
from headrace.trainer.layers.layer_functions import (
    LayerFunctions,
    compiled,
    run_layer,
    run_layer_checkpointed,
)
from headrace.trainer.stage.acceleration import attend_by_bounds, runs_compiled, runs_without_masks
from headrace.trainer.stage.micro_batch import MicroBatch

MASKED = {"falcon"}  # its attention is its own
QUICK = [("gemma3_text", True), ("gpt_oss", False)]
LONGER = [
    pytest.param(family, recomputed, marks=pytest.mark.exhaustive)
    for family in FAMILIES | DISCOVERED
    for recomputed in (False, True)
    if (family, recomputed) not in QUICK
]
ROW = 24
LAYOUTS = [[[24]] * 3, [[3, 21], [24], [1] * 24], [[12, 12]] * 3, [[5, 5, 5, 5, 4], [20, 4], [24]]]


def build_tiny(family, folder):
    return build(config_of(save_tiny(family, folder / family)))


def results(built, batch):
    """Loss and gradients, which are taken away."""
    loss, *_ = run_stages(built, batch)
    gradients = {name: x.clone() for name, x in gradients_of(built).items() if x is not None}
    built[0].stage.zero_grad()
    return loss, gradients


def compare(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    largest = max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in found[1].items():
        assert (gradient - expected[1][name]).norm() < 1e-5 * largest, name


def micro_batch(lengths):
    ids = torch.randint(3, 97, (len(lengths), ROW), generator=torch.Generator().manual_seed(7))
    rows = [ROW] * len(lengths)
    return ids, MicroBatch(lengths, rows, ids.roll(-1, 1), 1 / ids.numel(), 1.0, seed=0)


@pytest.mark.parametrize("family", FAMILIES | DISCOVERED)
def test_attention_by_bounds_is_that_under_masks(family, tmp_path):
    built = build_tiny(family, tmp_path)
    stage, batch = built[0].stage, make_batch()
    expected = results(built, batch)
    assert runs_without_masks(built[0].architecture, torch.bfloat16) == (family not in MASKED)
    if family in MASKED:
        return
    attend_by_bounds(stage)
    stage.by_bounds = True
    names = {
        part.config._attn_implementation for part in stage.modules() if hasattr(part, "config")
    }
    assert names == {NAME}
    compare(results(built, batch), expected)


@pytest.mark.parametrize(("family", "recomputed"), [*QUICK, *LONGER])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_compiled_layers_are_the_plain_twin_and_compile_no_more(family, recomputed, tmp_path):
    built = build_tiny(family, tmp_path)
    stage, batch, architecture = built[0].stage, make_batch(), built[0].architecture
    stage.recomputed = [recomputed] * len(stage.layers)
    expected = results(built, batch)
    assert runs_compiled(stage.layers, config_of("unused"), architecture)
    if family not in MASKED:
        attend_by_bounds(stage)
        stage.by_bounds = True
    counter = CompileCounterWithBackend("aot_eager")
    stage.layer_functions = LayerFunctions(
        compiled(run_layer, backend=counter), compiled(run_layer_checkpointed, backend=counter)
    )
    compare(results(built, batch), expected)
    counts = []
    for lengths in [*LAYOUTS, *LAYOUTS[:2]]:
        ids, inputs = micro_batch(lengths)
        stage(ids, inputs).value.backward()
        counts.append(counter.frame_count)
    assert 0 < counts[0] <= 2 * 3  # packed and not, of each kind of layer
    assert counts[1:] == counts[:1] * (len(counts) - 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_layers_with_a_state_are_not_compiled_for_each_layout(tmp_path):
    self_check.save_tiny(architecture_for("qwen3_next", tiny=True), tmp_path)
    built = build(config_of(tmp_path))
    stage, batch = built[0].stage, make_batch()
    expected = results(built, batch)
    assert any(stage.stateful) and not all(stage.stateful)
    assert runs_without_masks(built[0].architecture, torch.bfloat16)
    attend_by_bounds(stage)
    counter = CompileCounterWithBackend("eager")
    run = compiled(run_layer, backend=counter)
    stage.layer_functions = LayerFunctions(run, run)
    compare(results(built, batch), expected)
    before = counter.frame_count
    for lengths in LAYOUTS[1:]:
        ids, inputs = micro_batch(lengths)
        stage(ids, inputs).value.backward()
    assert counter.frame_count == before > 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_selective_recomputation_around_a_routers_loss_compiles_nothing(tmp_path):
    directory = save_tiny("gpt_oss", tmp_path / "model")
    expected = results(build(config_of(directory)), make_batch())
    built = build(config_of(directory, activation_checkpointing="selective"))
    stage, counter = built[0].stage, CompileCounterWithBackend("eager")
    attend_by_bounds(stage)
    run = compiled(run_layer, backend=counter)
    stage.layer_functions = LayerFunctions(run, run)
    compare(results(built, make_batch()), expected)
    assert counter.frame_count == 0
