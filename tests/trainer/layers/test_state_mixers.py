"""Layers with a state within stages: recomputed, as a reference, and told of documents as masks."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from model_types import architecture_for
from tiny_families import config_of, make_batch, run_forward
from transformers import AutoModelForCausalLM
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.qwen3_next import modeling_qwen3_next

from headrace.trainer.architecture.families_state import STATE_LAYERS
from headrace.trainer.architecture.read_architecture import architecture_of, read_architecture
from headrace.trainer.building.make_plan import make_plan
from headrace.trainer.building.model_builder import build_stage
from headrace.trainer.building.self_check import save_tiny
from headrace.trainer.families.state_kernels import rebound, without_kernels_on_cpus
from headrace.trainer.layers import state_mixers
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


def build(directory, device=CPU, **settings):
    """The whole model as one stage, without the trial of its type."""
    config = config_of(directory, 1, {"rank": 4}, router_loss=0.0, **settings)
    built = build_stage(config, 0, device, make_plan(config, read_architecture(directory)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for item in built.trained:
            noise = torch.randn(item.parameter.shape, generator=generator)
            item.parameter.add_(0.05 * noise.to(device))
    return built


def mixers_of(built):
    return [part for part in built.stage.modules() if isinstance(part, RestartsAtDocuments)]


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
    mixers = mixers_of(built)
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


def losses_and_gradients(built):
    batch, device = make_batch(), built.stage.device
    batch = replace(batch, ids=batch.ids.to(device), labels=batch.labels.to(device))
    output = run_forward([built], batch)[-1]
    output.value.backward()
    return [output.token_losses, *(item.parameter.grad for item in built.trained)]


def assert_alike(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def test_convolutions_take_documents_as_one_row(tmp_path):
    save_tiny(architecture_for("lfm2_moe", tiny=True), tmp_path)
    row, alone = build(tmp_path), build(tmp_path, kernels="torch")
    assert {mixer.one_row for mixer in mixers_of(row)} == {row.stage.states.one_row}
    assert {mixer.one_row for mixer in mixers_of(alone)} == {None}
    assert_alike(losses_and_gradients(row), losses_and_gradients(alone))


def by_document(function):
    """Stand-in for a kernel of flash-linear-attention: a function once for each document."""

    def kernel(*states, cu_seqlens, **named):
        if cu_seqlens is None:
            return function(*states, **named)
        sizes = cu_seqlens.diff().tolist()
        varying = {key: named.pop(key) for key in ("g", "beta") if key in named}
        parts = zip(*(x.split(sizes, 1) for x in (*states, *varying.values())), strict=True)
        count = len(states)
        mixed = [
            function(*part[:count], **dict(zip(varying, part[count:], strict=True)), **named)[0]
            for part in parts
        ]
        return torch.cat(mixed, 1), None

    return kernel


def linear_attention(queries, keys, values, *, g, scale):
    """What chunk_simple_gla computes, token by token."""
    state, mixed = 0.0, []
    for token in range(queries.shape[1]):
        update = keys[:, token].unsqueeze(-1) * values[:, token].unsqueeze(-2)
        state = state * g[:, token].exp()[..., None, None] + update
        mixed.append(scale * (queries[:, token].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(mixed, 1), None


SCANS = {
    "fla.ops.gated_delta_rule": (
        "chunk_gated_delta_rule",
        modeling_qwen3_next.torch_chunk_gated_delta_rule,
    ),
    "fla.ops.kda": ("chunk_kda", modeling_kimi_linear.chunk_kimi_delta_attention),
    "fla.ops.simple_gla": ("chunk_simple_gla", linear_attention),
}
IN_ONE_ROW = [
    family for family, states in STATE_LAYERS.items() if states.one_row and states.one_row.scan
]
QUICK = ("qwen3_next", "kimi_linear", "nemotron_h")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.exhaustive])
        for name in IN_ONE_ROW
    ],
)
def test_documents_are_one_row_where_a_kernel_restarts_a_state(family, tmp_path, monkeypatch):
    """The place of the kernels is taken by what they compute, once for each document."""
    save_tiny(architecture_for(family, tiny=True), tmp_path)
    alone = losses_and_gradients(build(tmp_path))
    calls = []
    for package, (name, function) in SCANS.items():
        kernel = by_document(function)
        counted = lambda *states, kernel=kernel, **named: (  # noqa: E731
            calls.append(named["cu_seqlens"]) or kernel(*states, **named)
        )
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(**{name: counted}))
    built = build(tmp_path)
    for mixer in mixers_of(built):
        assert mixer.one_row is None  # without a GPU
        mixer.one_row = built.stage.states.one_row
    assert_alike(losses_and_gradients(built), alone, tolerance=1e-4)  # see DRAWS in self_check
    assert [len(bounds) - 1 for bounds in calls] == [6] * len(mixers_of(built))


def test_kernels_that_transformers_has_found_are_not_run_on_cpus(monkeypatch):
    """As where the package is installed: the name that a mixer calls is a wrapper of the kernel."""

    def of_gpus(*states, **named):
        raise RuntimeError("0 active drivers")

    function = modeling_qwen3_next.torch_chunk_gated_delta_rule
    of_gpus.__wrapped__ = getattr(function, "__wrapped__", function)
    monkeypatch.setattr(modeling_qwen3_next, "torch_chunk_gated_delta_rule", of_gpus)
    rebound.cache_clear()
    architecture = architecture_for("qwen3_next", tiny=True)
    model = without_kernels_on_cpus(AutoModelForCausalLM.from_config(architecture.config))
    rebound.cache_clear()
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_kernels_stand_in_only_where_a_mixer_asks_for_what_they_replace(monkeypatch, tmp_path):
    monkeypatch.setattr(state_mixers, "has_kernels", lambda device: True)
    for family, expected in (("qwen3_next", True), ("mamba2", True), ("jamba", False)):
        save_tiny(architecture_for(family, tiny=True), tmp_path / family)
        found = {mixer.one_row is not None for mixer in mixers_of(build(tmp_path / family))}
        assert found == {expected}, family


def test_a_convolution_after_projections_with_biases_runs_by_document(tmp_path):
    config = architecture_for("lfm2_moe", tiny=True).config
    config.conv_bias = True
    save_tiny(architecture_of(config, "lfm2_moe"), tmp_path)
    assert {mixer.one_row for mixer in mixers_of(build(tmp_path))} == {None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_flash_linear_attention_restarts_at_documents(hybrid):
    pytest.importorskip("fla")
    settings = {"dtype": "bfloat16", "device": torch.device("cuda")}
    row, alone = build(hybrid, **settings), build(hybrid, kernels="torch", **settings)
    assert all(mixer.one_row is not None for mixer in mixers_of(row))
    found, expected = losses_and_gradients(row), losses_and_gradients(alone)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 0.05 * other.norm()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ("mamba2", "minimax") else [pytest.mark.exhaustive])
        for name in STATE_LAYERS
    ],
)
def test_hidden_states_have_one_type_wherever_a_model_is_cut(tmp_path, family):
    """Mamba's layers hand on float32; nothing else does, trained in full or not."""
    save_tiny(architecture_for(family, tiny=True), tmp_path)
    for adapter in ({"kind": "none"}, {"kind": "lora", "rank": 4}):
        totals = []
        for stages in (1, 2):
            config = config_of(tmp_path, stages, adapter, dtype="bfloat16", router_loss=0.0)
            plan = make_plan(config, read_architecture(tmp_path))
            built = [build_stage(config, stage, CPU, plan) for stage in range(stages)]
            outputs = run_forward(built, make_batch())
            totals.append(outputs[-1].value.item())
        wide = family in ("mamba", "mamba2", "falcon_mamba")
        assert outputs[0].value.dtype == (torch.float32 if wide else torch.bfloat16)
        assert outputs[0].value.dtype == built[1].stage.hidden_dtype
        assert totals[0] == totals[1]
