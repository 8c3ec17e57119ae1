"""Control adapters: what they compute, what a step leaves of them, and what can be made of them."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from runs import STDLIB, checkpoint_tensors, exact_metrics, make_shards, source
from tiny_families import (
    LAYERS,
    build,
    config_of,
    gradients_of,
    make_batch,
    run_micro_batch,
    run_on,
    save_tiny,
)
from transformers import AutoModelForCausalLM

from headrace.jobs.commands.control_report import control_report
from headrace.schemas.errors import ConfigError
from headrace.trainer.adapters.control import ControlAdapter, control_adapters, regularize
from headrace.trainer.architecture.families import FAMILIES
from headrace.trainer.batches.control_classes import classes_of_row, make_controlled_batch
from headrace.trainer.batches.extras import Extras
from headrace.trainer.export.control_analysis import analyze
from headrace.trainer.export.control_file import LayerControl, read_control
from headrace.trainer.export.control_lora import control_to_lora
from headrace.trainer.export.export import adapter_tensors
from headrace.trainer.optim.optimizer import build_optimizer
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.shards.decoded_rows import Row
from headrace.trainer.stage.stage import MicroBatch

HIDDEN, RANK = 48, 6
CONTROL = {"kind": "control", "rank": RANK}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_adapter(dropout=0.0):
    generator = torch.Generator().manual_seed(2)
    adapter = ControlAdapter(HIDDEN, RANK, dropout)
    adapter.directions = torch.nn.Parameter(
        torch.nn.init.orthogonal_(torch.empty(HIDDEN, RANK), generator=generator)
    )
    adapter.log_stretches = torch.nn.Parameter(torch.randn(RANK, generator=generator) * 0.5)
    return adapter


def states(seed, *shape):
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed))


def stretched(adapter, change, classes):
    """T d of the page, with matrices of hidden size x hidden size, in float64."""
    q, s = adapter.directions.detach().double(), adapter.log_stretches.detach().double()
    results = []
    for row, c in zip(change.double().flatten(0, -2), classes.flatten().tolist(), strict=True):
        factor = torch.expm1(s) if c == 1 else torch.expm1(-s) if c == -1 else torch.zeros_like(s)
        results.append((torch.eye(HIDDEN) + q @ torch.diag(factor) @ q.T) @ row)
    return torch.stack(results).view(change.shape)


def test_each_token_is_stretched_by_its_class():
    adapter, before, after = make_adapter(), states(0, 2, 9), states(1, 2, 9)
    classes = torch.tensor([[1, -1, 0] * 3, [0, 0, 1, 1, -1, -1, 1, 0, -1]], dtype=torch.int8)
    expected = before.double() + stretched(adapter, after - before, classes)
    ours = adapter(before, after, classes)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[classes == 0], after[classes == 0])


def test_each_token_is_projected_once_whatever_the_classes():
    """qlora-pipe-lite 3.2.12: both branches were computed for every token."""
    adapter, calls = make_adapter(), []
    classes = torch.tensor([[1, -1, 0]], dtype=torch.int8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        adapter(states(0, 1, 3), states(1, 1, 3), classes)
    calls = [event for event in profile.key_averages() if event.key == "aten::mm"]
    assert sum(event.count for event in calls) == 2


def test_class_minus_one_undoes_class_one_after_a_hundred_steps():
    adapter, goal = make_adapter(), states(5, 40)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    zeros, ones = torch.zeros(40, HIDDEN), torch.ones(40, dtype=torch.int8)
    change = states(6, 40)
    for _ in range(100):
        loss = (adapter(zeros, change, ones) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        regularize(adapter, gamma=0.5, shrinkage=0.0)
    there = adapter(zeros, change, ones)
    assert (there - change).norm() > 0.1 * change.norm(), "nothing was learned to undo"
    back = adapter(zeros, there, -ones)
    assert (back - change).norm() < 1e-6 * change.norm()


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_a_step_leads_directions_back_and_shrinks_stretches(gamma):
    adapter = make_adapter()
    with torch.no_grad():
        adapter.directions += 0.02 * states(3, RANK).T
    q, s = adapter.directions.detach().clone().double(), adapter.log_stretches.detach().clone()
    regularize(adapter, gamma, shrinkage=0.25)
    expected = q
    for _ in range(3 if gamma == 0.5 else 1):
        expected = expected - gamma * expected @ (expected.T @ expected - torch.eye(RANK))
    torch.testing.assert_close(adapter.directions.detach().double(), expected)
    torch.testing.assert_close(adapter.log_stretches.detach(), 0.75 * s)
    for _ in range(60):
        regularize(adapter, gamma, shrinkage=0.0)
    gram = adapter.directions.detach().T @ adapter.directions.detach()
    assert (gram - torch.eye(RANK)).norm() < 1e-5


# --- classes ---


def make_row(control_class, key=7, documents=(5, 3), mask=None):
    ids = np.arange(sum(documents), dtype=np.int32)
    lengths = np.array(documents, np.int32)
    return Row(ids, mask, lengths, "texts", key, control_class)


def test_a_token_has_the_class_of_what_it_is_to_predict():
    mask = np.array([1, 1, 0, 1, 1, 1, 1, 1], bool)
    rows = [make_row(-1, mask=mask), make_row(1), make_row(None, documents=(2,))]
    batch = make_controlled_batch([[rows, []]], 20, Position(), OverlongCount(), seed=0)
    first, second = batch.extras[0].control_classes.tolist()
    assert first == [-1, 0, -1, -1, 0, -1, -1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 0]
    assert second == [0] * 20
    assert batch.extras[0].control_classes.dtype == torch.int8
    assert ((batch.labels[0, 0] >= 0) == (batch.extras[0].control_classes[0] != 0)).all()


def test_documents_of_class_zero_go_either_way_by_chance():
    """qlora-pipe-lite 3.2.3: the first 682 rows of class 0 all went the same way."""
    drawn = np.array(
        [classes_of_row(make_row(0, key, (1, 1)), 2, seed=0).tolist() for key in range(2000)]
    )
    assert set(drawn.flatten().tolist()) == {-1, 1}
    assert abs(drawn[:600].mean()) < 0.1
    assert abs(drawn.mean()) < 0.05
    neighbors = [(drawn[1:, 0] * drawn[:-1, 0]).mean(), (drawn[:, 0] * drawn[:, 1]).mean()]
    assert np.abs(neighbors).max() < 0.08
    again = classes_of_row(make_row(0, 11, (1, 1)), 2, seed=0).tolist()
    assert again == drawn[11].tolist()
    other = [classes_of_row(make_row(0, key, (1,)), 1, seed=1)[0] for key in range(200)]
    assert other != drawn[:200, 0].tolist()


# --- in the pipeline ---


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("control")
    return {
        name: save_tiny(name, directory / name) for name in ("llama", "cohere", "cohere2", "gemma2")
    }


def micro_batch(seed=0):
    batch = make_batch()
    classes = torch.where(batch.labels >= 0, 1, 0).to(torch.int8)
    classes[0, :7] *= -1
    return batch, MicroBatch(
        document_lengths=batch.document_lengths,
        row_lengths=batch.row_lengths,
        labels=batch.labels,
        loss_scale=1 / batch.trained_tokens,
        router_scale=1.0,
        seed=seed,
        extras=Extras(control_classes=classes),
    )


def stretch(built):
    """Away from the identity, the same in every layout."""
    generator = torch.Generator().manual_seed(4)
    for part in built:
        for _, adapter in control_adapters(part.stage.names):
            values = 0.4 * torch.randn(adapter.log_stretches.shape, generator=generator)
            adapter.log_stretches.data.copy_(values)


def test_an_adapter_starts_as_the_model_itself_and_has_its_own_parameters_only(models):
    batch, side = micro_batch()
    built = build(config_of(models["llama"], 2, {**CONTROL, "layers": "1:2"}))
    plain = build(config_of(models["llama"], 1))
    names = [item.name for part in built for item in part.trained]
    assert names == [
        f"model.layers.{layer}.control_adapter.{part}"
        for layer in (1, 2)
        for part in ("directions", "log_stretches")
    ]
    assert sum(i.parameter.numel() for p in built for i in p.trained) == 2 * RANK * (32 + 1)
    with torch.no_grad():
        ours, theirs = (run_on(b, batch.ids, side)[-1].token_losses for b in (built, plain))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_two_stages_give_the_bits_of_one(models, recompute):
    results = []
    for stages in (1, 2):
        settings = {"activation_checkpointing": "full" if stages == 2 else recompute}
        adapter = {**CONTROL, "dropout": 0.1}
        built = build(config_of(models["llama"], stages, adapter, **settings))
        stretch(built)
        for part in built:
            part.stage.train()
        batch, side = micro_batch(seed=3)
        output = run_micro_batch(built, batch.ids, side)[-1]
        results.append((output, gradients_of(built)))
    (one, gradients), (two, others) = results
    assert torch.equal(one.token_losses, two.token_losses)
    assert len(gradients) == 2 * LAYERS
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert torch.equal(gradient, others[name]), name


def test_directions_are_not_decayed_by_the_optimizer(models):
    built = build(config_of(models["llama"], 1, CONTROL))
    config = config_of(models["llama"], 1, CONTROL).optimizer
    optimizer = build_optimizer(config, built[0].trained)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


# --- what is made of them ---


def saved(model, run_directory, **adapter):
    """A run's adapter directory, with stretches."""
    built = build(config_of(model, 1, {**CONTROL, **adapter}))
    stretch(built)
    directory = run_directory / "adapter"
    directory.mkdir()
    built[0].method.write(directory, adapter_tensors(built[0], torch.float32), 1, model)
    return built, directory


def test_numbers_are_those_of_the_whole_matrix():
    adapter = make_adapter()
    with torch.no_grad():
        adapter.directions += 0.05 * states(3, RANK).T
    q, s = adapter.directions.detach().double(), adapter.log_stretches.detach().double()
    numbers = analyze(LayerControl(3, q, s))
    whole = q @ torch.diag(torch.expm1(s)) @ q.T
    values = torch.linalg.svdvals(whole)
    eye = torch.eye(HIDDEN)
    there, back = eye + whole, eye + q @ torch.diag(torch.expm1(-s)) @ q.T
    assert numbers.spectral_norm == pytest.approx(values.max().item())
    assert numbers.frobenius_norm == pytest.approx(values.square().sum().sqrt().item())
    assert numbers.nuclear_norm == pytest.approx(values.sum().item())
    rank = values.sum() ** 2 / values.square().sum()
    assert numbers.effective_rank == pytest.approx(rank.item())
    assert numbers.condition == pytest.approx(torch.linalg.cond(there).item())
    assert numbers.non_orthogonality == pytest.approx(
        (q.T @ q - torch.eye(RANK)).norm().item() ** 2
    )
    assert numbers.inverse_error == pytest.approx((there @ back - eye).norm().item())
    nothing = analyze(LayerControl(0, q, torch.zeros(RANK, dtype=torch.float64)))
    assert (nothing.effective_rank, nothing.condition) == (0.0, 1.0)


def test_what_is_saved_is_shown_layer_by_layer_and_is_not_taken_for_a_lora(models, tmp_path):
    """qlora-pipe-lite 3.2.14: an adapter_config.json that PEFT could not load."""
    built, adapter = saved(models["llama"], tmp_path, layers="0,2:3")
    assert sorted(path.name for path in adapter.iterdir()) == [
        "control_adapter.json",
        "control_adapter.safetensors",
    ]
    record = json.loads((adapter / "control_adapter.json").read_text())
    assert (record["kind"], record["rank"], record["layers"]) == ("control", RANK, "0,2:3")
    controls = read_control(adapter)
    assert [control.layer for control in controls] == [0, 2, 3]
    kept = dict(control_adapters(built[0].stage.names))
    for control in controls:
        original = kept[f"model.layers.{control.layer}.control_adapter"]
        assert torch.equal(control.directions.float(), original.directions.detach())
        assert torch.equal(control.log_stretches.float(), original.log_stretches.detach())
    output = io.StringIO()
    picture = tmp_path / "control.png"
    layers = control_report(adapter, Console(file=output, width=120), picture)
    assert [layer.layer for layer in layers] == [0, 2, 3]
    assert picture.stat().st_size > 5000
    assert f"{layers[1].frobenius_norm:.4g}" in output.getvalue()
    with pytest.raises(ConfigError, match="not found; give the `adapter` directory"):
        control_report(tmp_path, Console(file=output), None)


@pytest.mark.parametrize("family", ["cohere", "cohere2"])
@pytest.mark.parametrize("inverse", [False, True])
def test_over_parallel_blocks_it_becomes_an_ordinary_lora(models, family, inverse, tmp_path):
    built, adapter = saved(models[family], tmp_path)
    error = control_to_lora(models[family], adapter, tmp_path / "lora", inverse=inverse)
    assert error < 1e-5
    batch, side = micro_batch()
    classes = torch.full(batch.ids.shape, -1 if inverse else 1, dtype=torch.int8)
    ids = batch.ids[1:2]
    side = replace(
        side,
        document_lengths=[[24]],
        row_lengths=[24],
        labels=batch.labels[1:2],
        extras=Extras(control_classes=classes[1:2]),
    )
    with torch.no_grad():
        ours = run_on(built, ids, side)[-1].token_losses[0, :-1]
        base = AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32)
        logits = PeftModel.from_pretrained(base, tmp_path / "lora").eval()(ids).logits
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(losses, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_where_it_would_not_be_the_same_it_is_refused_unless_forced(models, family, tmp_path):
    """qlora-pipe-lite 3.2.6: a fold that missed half of the effect was called exact."""
    _, adapter = saved(models[family], tmp_path)
    with pytest.raises(ConfigError, match=r"would miss \d+\.\d% .* not made of parallel blocks"):
        control_to_lora(models[family], adapter, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    error = control_to_lora(models[family], adapter, tmp_path / "lora", force=True)
    assert error > 0.1
    assert (tmp_path / "lora" / "adapter_config.json").is_file()


def test_a_model_without_the_layer_to_fold_into_is_named(tmp_path, monkeypatch):
    """qlora-pipe-lite 3.2.6: missing layers were skipped without a word."""
    wrong = replace(FAMILIES["starcoder2"], outputs=("mlp.down_proj",))
    monkeypatch.setitem(FAMILIES, "starcoder2", wrong)
    directory = save_tiny("starcoder2", tmp_path / "model")
    _, adapter = saved(directory, tmp_path)
    with pytest.raises(ConfigError, match=r"Starcoder2.* no linear layer mlp.down_proj"):
        control_to_lora(directory, adapter, tmp_path / "lora", force=True)


# --- whole runs ---


@pytest.mark.slow
def test_a_run_on_three_classes_is_the_same_in_two_stages_and_after_a_resumption(
    training, tiny_model, tiny_shards, tmp_path
):
    texts = [
        {**source(name, STDLIB / name / "*.py"), "control_class": c}
        for name, c in (("json", 1), ("wsgiref", -1), ("dbm", 0))
    ]
    shards = make_shards(tiny_model, tmp_path / "shards", sources=texts)
    config = training.config.read_text().replace(str(tiny_shards), str(shards))
    training.config.write_text(config.replace("dropout = 0.1", 'kind = "control"'))
    settings = {"adapter__control_decay": 0.5, "optimizer__lr": 5e-2, "loader__pack": "best_fit"}
    settings |= {"loader__tokens_per_row": 80, "max_steps": 8, "scheduler__warmup_steps": 0}
    one = training.run("one", 1, **settings, checkpoint__every_steps=4)
    layers = control_report(one / "adapter", Console(file=io.StringIO()), None)
    assert all(layer.frobenius_norm > 0.01 for layer in layers)
    assert all(layer.inverse_error < 1e-5 for layer in layers)

    lines, expected = exact_metrics(one), checkpoint_tensors(one)
    (one / "checkpoints" / "step-000008").rename(one / "kept")
    training.run("one", 2, "--resume", **settings, checkpoint__every_steps=4, pipeline_stages=2)
    assert exact_metrics(one) == lines
    resumed = checkpoint_tensors(one)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
