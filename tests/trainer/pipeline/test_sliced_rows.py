"""A row in slices is the row: losses of tokens and gradients of every family, in one process."""

import pytest
import torch
from tiny_families import CPU, DISCOVERED, FAMILIES, config_of, gradients_of, make_batch, save_tiny

from headrace.trainer.batches.extras import NO_EXTRAS
from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.building.model_builder import build_stage
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.layers.layer_functions import (
    LayerFunctions,
    compiled,
    run_layer,
    run_layer_checkpointed,
)
from headrace.trainer.layers.rotary_attention import swap_attention
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.run.open_session import build_engine
from headrace.trainer.stage.acceleration import attend_by_bounds
from headrace.trainer.stage.sliced_attention import keys_in_use, slice_rows

FEW = ("gemma3_text", "phi3", "gpt_oss", "deepseek_v3")
EVERY = sorted({*FAMILIES, *DISCOVERED} - {"falcon", *FEW})
ROUTERS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
BOUNDED = ("qwen3", "gemma2", "mistral", "deepseek_v3")
LORA = {"rank": 4, "dropout": 0.0}


@pytest.fixture(autouse=True)
def local_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # which DeepSpeed asks for


def inputs_of(batch):
    """Two micro-batches of the same rows, the second upside down."""
    ids, labels = (torch.stack([x, x.flip(0)]).int() for x in (batch.ids, batch.labels))
    both = [batch.document_lengths, batch.document_lengths[::-1]]
    return StepInputs(
        micro_batches=2,
        document_lengths=both,
        row_lengths=[batch.row_lengths, batch.row_lengths[::-1]],
        trained_tokens=2 * batch.trained_tokens,
        tokens=2 * sum(batch.row_lengths),
        position=Position(),
        overlong=OverlongCount(),
        extras=[NO_EXTRAS] * 2,
        input_ids=ids,
        labels=labels,
    )


def opened(config, layout, prepare=lambda stage, family: None):
    """Return a whole model, away from its initial values, and its engine."""
    built = build_stage(config, 0, CPU, plan_model(config))
    prepare(built.stage, built.architecture.family)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for item in built.trained:
            item.parameter.add_(torch.randn(item.parameter.shape, generator=generator) * 0.05)
    return built, build_engine(built, config, layout)


def run(config, layout, *prepare):
    """Return the losses and statistics of tokens, the routers' loss and the gradients of a step."""
    built, engine = opened(config, layout, *prepare)
    losses = engine.forward_backward(inputs_of(make_batch()), 0, statistics=True)
    if built.tied_head is not None:
        built.tied_copy.grad += built.tied_head.grad
    gradients = {name: g for name, g in gradients_of([built]).items() if g is not None}
    return losses._values.tokens(), losses.router_loss, gradients


def compare(found, expected):
    """Losses to 1e-6 and gradients to 1e-5, relative."""
    (tokens, router, gradients), (tokens_there, router_there, gradients_there) = found, expected
    for name, values in vars(tokens_there).items():
        mine = getattr(tokens, name)
        assert (mine is None) == (values is None), name
        if values is not None and name != "ranks":
            torch.testing.assert_close(*map(torch.from_numpy, (mine, values)), rtol=1e-5, atol=2e-6)
    total = tokens_there.losses.sum()
    assert tokens.losses.sum() == pytest.approx(total, rel=1e-6)
    assert total > 0
    assert router == (None if router_there is None else pytest.approx(router_there, rel=1e-6))
    norm = torch.stack([g.norm() for g in gradients_there.values()]).norm()
    assert norm > 0
    assert gradients.keys() == gradients_there.keys()
    for name, gradient in gradients_there.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * norm, name


def check(model, layout, slices, *prepare, **settings):
    whole = run(config_of(model, **settings), layout)
    sliced = config_of(model, sequence_slices=slices, **settings)
    compare(run(sliced, layout, *prepare), whole)
    return whole


@pytest.mark.parametrize(
    "family", [*FEW, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in EVERY)]
)
def test_families_give_what_they_give_of_whole_rows(family, tmp_path, layout):
    """Windows, frequencies by document, sinks, latent attention, soft-caps and routers."""
    model = save_tiny(family, tmp_path / family)
    _, router, _ = check(model, layout, 3)
    assert (router is not None) == (family in ROUTERS)
    check(model, layout, 4, adapter=LORA, activation_checkpointing="full")


def by_bounds(stage, family):
    """Let a stage attend as on GPUs, by our module where there is one."""
    attend_by_bounds(stage)
    stage.by_bounds = True
    for layer in stage.layers if family.llama_attention else ():
        swap_attention(layer, family.attention_module)
    slice_rows(stage.layers)
    stage.keys_in_use = [keys_in_use(layer) for layer in stage.layers]


def compiled_by_bounds(stage, family):
    by_bounds(stage, family)
    stage.layer_functions = LayerFunctions(
        compiled(run_layer, backend="aot_eager"),
        compiled(run_layer_checkpointed, backend="aot_eager"),
    )


@pytest.mark.parametrize(
    "family", ["gpt_oss", *(pytest.param(f, marks=pytest.mark.exhaustive) for f in BOUNDED)]
)
def test_attention_by_bounds_does_too(family, tmp_path, layout):
    model = save_tiny(family, tmp_path / family)
    check(model, layout, 3, by_bounds)
    check(model, layout, 2, by_bounds, adapter=LORA, activation_checkpointing="selective")


@pytest.mark.parametrize("again", ["none", pytest.param("full", marks=pytest.mark.exhaustive)])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_compiled_layers_do_too(again, tmp_path, layout):
    model = save_tiny("qwen3", tmp_path / "qwen3")
    settings = {"adapter": LORA, "activation_checkpointing": again}
    check(model, layout, 3, compiled_by_bounds, **settings)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_an_evaluation_goes_over_whole_rows_and_leaves_nothing_behind(tmp_path, layout):
    model = save_tiny("qwen3", tmp_path / "qwen3")
    found = []
    for slices in (1, 3):
        _, engine = opened(config_of(model, sequence_slices=slices), layout)
        engine.forward_backward(inputs_of(make_batch()), 0)
        found.append(engine.forward_only(inputs_of(make_batch()))._values.tokens().losses)
    assert (found[0] == found[1]).all()
