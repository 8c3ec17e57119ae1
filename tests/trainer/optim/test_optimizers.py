"""Every optimizer is its library's own, continues to the bit, and knows its states by name."""

import pytest
import torch
from checkpoints import state
from runs import checkpoint_tensors, exact_metrics
from torch import nn

from headrace.schemas.errors import CheckpointError, ConfigError
from headrace.schemas.train.optimizer_config import OptimizerConfig
from headrace.schemas.train.optimizers import OPTIMIZERS
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer import preflight
from headrace.trainer.building.checkpoint_files import average
from headrace.trainer.building.materializer import TrainedParameter
from headrace.trainer.checkpoint.checkpoint_folder import collect_tensors, load_tensors
from headrace.trainer.checkpoint.saver import Saver
from headrace.trainer.optim.optimizer import build_optimizer, set_learning_rate
from headrace.trainer.optim.states import averaged, fresh_states, tensors_of

RUN_ON_CPU = [kind for kind, record in OPTIMIZERS.items() if not record.cpu_substitute]
TYPES = [kind for kind in RUN_ON_CPU if kind != "adamw_kahan"]  # which is ours: no library's
SETTINGS = {"lr": 1e-2, "beta1": 0.8, "beta2": 0.95, "eps": 1e-7}
SHAPES = {"model.a.weight": (96, 64), "model.b.lora_B.default.weight": (40, 8), "model.norm": (16,)}
DECAYED = [True, True, False]


def fresh():
    """A matrix, the B of an adapter, and a norm; the matrix has more than 4096 entries."""
    generator = torch.Generator().manual_seed(0)
    return [
        TrainedParameter(name, nn.Parameter(torch.randn(shape, generator=generator)), owned=True)
        for name, shape in SHAPES.items()
    ]


def config(kind, **changes):
    decay = 0.0 if kind == "adam" else 0.1
    return OptimizerConfig(**{"type": kind, "weight_decay": decay, **SETTINGS, **changes})


def run(optimizer, trained, steps, rates=None):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for item in trained:
            item.parameter.grad = torch.randn(item.parameter.shape, generator=generator)
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        optimizer.step()
        optimizer.zero_grad()


def reference(kind, parameters):
    """As a user of the library would build it, decay left out for norms."""
    lr, betas, eps = SETTINGS["lr"], (SETTINGS["beta1"], SETTINGS["beta2"]), SETTINGS["eps"]
    groups = [
        {"params": [p], "weight_decay": 0.1 if decayed else 0.0}
        for p, decayed in zip(parameters, DECAYED, strict=True)
    ]
    match kind:
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=eps)
        case "adamw_8bit":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(groups, lr=lr, betas=betas, eps=eps)
        case "lion":
            from lion_pytorch import Lion

            return Lion(groups, lr=lr, betas=betas)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=lr)
        case "adamw_schedule_free":
            from schedulefree import AdamWScheduleFreeReference

            return AdamWScheduleFreeReference(groups, lr=lr, betas=betas, eps=eps)


@pytest.mark.parametrize("kind", TYPES)
def test_it_steps_as_its_librarys_reference(kind):
    ours, theirs = fresh(), fresh()
    optimizer = build_optimizer(config(kind), ours)
    run(optimizer, ours, range(6))
    other = reference(kind, [item.parameter for item in theirs])
    if kind == "adamw_schedule_free":
        other.train()
    run(other, theirs, range(6))
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.parameter, its.parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", RUN_ON_CPU)
def test_it_goes_on_to_the_bit_from_what_a_checkpoint_holds(kind, layout, folder):
    whole, trained = fresh(), fresh()
    straight, optimizer = (build_optimizer(config(kind), items) for items in (whole, trained))
    run(straight, whole, range(6))
    run(optimizer, trained, range(3))
    Saver(folder, layout, background=False).begin(state(3), trained, optimizer)

    again = fresh()
    resumed = build_optimizer(config(kind), again)
    load_tensors(folder.finished()[-1], again, resumed)
    run(resumed, again, range(3, 6))
    expected, found = collect_tensors(whole, straight), collect_tensors(again, resumed)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert any(tensor.any() for name, tensor in found.items() if not name.startswith("parameter/"))


@pytest.mark.parametrize("kind", RUN_ON_CPU)
def test_what_was_never_stepped_can_be_saved_and_taken_up(kind, layout, folder):
    """A run whose first steps were skipped; its optimizer has made no states yet."""
    trained, again = fresh(), fresh()
    optimizer, resumed = (build_optimizer(config(kind), items) for items in (trained, again))
    Saver(folder, layout, background=False).begin(state(1), trained, optimizer)
    load_tensors(folder.finished()[-1], again, resumed)
    for items, stepped in ((trained, optimizer), (again, resumed)):
        run(stepped, items, range(3))
    for one, other in zip(trained, again, strict=True):
        assert torch.equal(one.parameter, other.parameter)


@pytest.mark.parametrize("kind", RUN_ON_CPU)
def test_its_states_have_the_names_and_the_size_of_its_record(kind):
    """The plan counts with that size, in numbers of the weight's type; small states apart."""
    trained = fresh()
    optimizer = build_optimizer(config(kind), trained)
    run(optimizer, trained, range(1))
    item = trained[0]
    stepped = tensors_of(optimizer, item.parameter)
    numbers = sum(value.nbytes for value in stepped.values()) / item.parameter.nbytes
    assert numbers == pytest.approx(OPTIMIZERS[kind].numbers_per_weight, abs=0.03)
    started = tensors_of(build_optimizer(config(kind), trained), item.parameter)
    assert {name: (value.shape, value.dtype) for name, value in stepped.items()} == {
        name: (value.shape, value.dtype) for name, value in started.items()
    }


@pytest.mark.parametrize("kind", RUN_ON_CPU)
def test_a_weight_may_be_cut_where_its_record_says_that_it_may(kind):
    """Two halves that are stepped by themselves; blocks of 8 bits and Adafactor's rows mix them."""
    whole = [TrainedParameter("a.weight", nn.Parameter(fresh()[0].parameter.detach()[:90]), True)]
    values = whole[0].parameter.detach().clone().chunk(2)
    halves = [TrainedParameter(f"{n}.weight", nn.Parameter(v), True) for n, v in enumerate(values)]
    one, two = (build_optimizer(config(kind), items) for items in (whole, halves))
    for _ in range(3):
        gradient = torch.randn(90, 64, generator=torch.Generator().manual_seed(3))
        whole[0].parameter.grad = gradient
        for half, part in zip(halves, gradient.clone().chunk(2), strict=True):
            half.parameter.grad = part
        one.step()
        two.step()
    joined = torch.cat([half.parameter for half in halves])
    assert torch.equal(whole[0].parameter, joined) == OPTIMIZERS[kind].elementwise


def test_states_that_no_record_has_are_an_error():
    trained = fresh()
    groups = [{"params": [item.parameter for item in trained]}]
    with pytest.raises(TypeError, match="SGD: no record"):
        fresh_states(torch.optim.SGD(groups, lr=1.0), trained[0].parameter)
    more = torch.optim.AdamW(groups, lr=1.0, amsgrad=True)
    run(more, trained, range(1))
    with pytest.raises(CheckpointError, match=r"AdamW: its states differ .* max_exp_avg_sq"):
        tensors_of(more, trained[0].parameter)


def test_lora_plus_holds_for_every_optimizer():
    for kind in TYPES:
        optimizer = build_optimizer(config(kind, lora_plus_ratio=4.0), fresh())
        set_learning_rate(optimizer, 0.5)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert sorted(rates.values()) == [0.5, 0.5, 2.0], kind


def test_schedule_free_weights_are_averages_while_they_are_used_and_then_as_before():
    trained = fresh()
    optimizer = build_optimizer(config("adamw_schedule_free"), trained)
    run(optimizer, trained, range(4))
    before = [item.parameter.detach().clone() for item in trained]
    expected = [
        average(value, optimizer.state[item.parameter]["z"], SETTINGS["beta1"])
        for value, item in zip(before, trained, strict=True)
    ]
    with averaged(optimizer, trained):
        inside = [item.parameter.detach().clone() for item in trained]
    for value, used, wanted, item in zip(before, inside, expected, trained, strict=True):
        assert torch.equal(used, wanted)
        assert not torch.equal(used, value)
        assert torch.equal(item.parameter, value)
    run(optimizer, trained, range(4, 5))  # it is in its training mode again


def test_paged_states_are_refused_on_a_cpu():
    with pytest.raises(ConfigError, match=r'"adamw_8bit_paged" needs a GPU; set "adamw_8bit"'):
        build_optimizer(config("adamw_8bit_paged"), fresh())


def test_a_missing_library_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    settings = {"model": "m", "output_dir": "o", "datasets": [{"path": "d"}]}
    wanted = TrainConfig.model_validate(settings | {"optimizer": {"type": "lion", "lr": 1e-4}})
    with pytest.raises(ConfigError, match=r"needs lion_pytorch; run: pip install 'lion-pytorch>="):
        preflight.check_optimizer(wanted)
    preflight.check_optimizer(
        wanted.model_copy(update={"optimizer": OptimizerConfig(type="adafactor", lr=1e-3)})
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", TYPES)
def test_every_optimizer_is_the_same_over_two_stages_and_after_resumption(training, kind):
    settings = {"optimizer__type": kind, "max_steps": 4, "checkpoint__every_steps": 2}
    if kind == "adamw_schedule_free":
        settings["scheduler__type"] = "constant"
    one = training.run("one", 1, **settings)
    two = training.run("two", 2, pipeline_stages=2, **settings)
    assert exact_metrics(two) == exact_metrics(one)
    for file in (two / "checkpoints" / "step-000004").iterdir():
        file.unlink()
    (two / "checkpoints" / "step-000004").rmdir()
    training.run("two", 1, "--resume", **settings)
    assert exact_metrics(two) == exact_metrics(one)
    found, tensors = checkpoint_tensors(two), checkpoint_tensors(one)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
