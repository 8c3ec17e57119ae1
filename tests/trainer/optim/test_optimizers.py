"""Every optimizer is its library's own, continues to the bit, and knows its states by name."""

import dataclasses
import shutil

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


class Both:
    """Two optimizers that are stepped together."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        self.param_groups = [group for one in optimizers for group in one.param_groups]

    def step(self):
        for one in self.optimizers:
            one.step()

    def zero_grad(self):
        for one in self.optimizers:
            one.zero_grad()


def muon(groups):
    """Matrices by Muon, the norm by AdamW."""
    *matrices, norm = groups
    settings = {"lr": SETTINGS["lr"], "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    betas, eps = (SETTINGS["beta1"], SETTINGS["beta2"]), SETTINGS["eps"]
    return Both(
        torch.optim.Muon(matrices, **settings),
        torch.optim.AdamW([norm], lr=SETTINGS["lr"], betas=betas, eps=eps, fused=True),
    )


def from_bitsandbytes(name):
    def make(groups, **settings):
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(groups, **settings)

    return make


def lion(groups, **settings):
    from lion_pytorch import Lion

    return Lion(groups, **settings)


def schedule_free(groups, **settings):
    from schedulefree import AdamWScheduleFreeReference

    optimizer = AdamWScheduleFreeReference(groups, **settings)
    optimizer.train()
    return optimizer


def unscaled(groups, lr):
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False)


LR, EPS = {"lr": SETTINGS["lr"]}, {"eps": SETTINGS["eps"]}
BETAS = {"betas": (SETTINGS["beta1"], SETTINGS["beta2"])}
REFERENCES = {  # as a user of the library would build it
    "adamw": lambda groups: torch.optim.AdamW(groups, **LR, **BETAS, **EPS),
    "adam": lambda groups: torch.optim.Adam(groups, **LR, **BETAS, **EPS),
    "adamw_8bit": lambda groups: from_bitsandbytes("AdamW8bit")(groups, **LR, **BETAS, **EPS),
    "lion": lambda groups: lion(groups, **LR, **BETAS),
    "lion_8bit": lambda groups: from_bitsandbytes("Lion8bit")(groups, **LR, **BETAS),
    "muon": muon,
    "sgd": lambda groups: torch.optim.SGD(groups, **LR, momentum=0.9),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, **LR, **EPS),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, **LR),
    "adafactor_unscaled": lambda groups: unscaled(groups, **LR),
    "adamw_schedule_free": lambda groups: schedule_free(groups, **LR, **BETAS, **EPS),
}


def reference(kind, parameters):
    """The library's own, decay left out for norms."""
    decay = 0.0 if kind == "adam" else 0.1
    groups = [
        {"params": [p], "weight_decay": decay if decayed else 0.0}
        for p, decayed in zip(parameters, DECAYED, strict=True)
    ]
    return REFERENCES[kind](groups)


@pytest.mark.parametrize("kind", TYPES)
def test_it_steps_as_its_librarys_reference(kind):
    ours, theirs = fresh(), fresh()
    optimizer = build_optimizer(config(kind), ours)
    run(optimizer, ours, range(20))
    run(reference(kind, [item.parameter for item in theirs]), theirs, range(20))
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.parameter, its.parameter, rtol=1e-6, atol=1e-6)


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
    numbers = sum(value.nbytes for value in stepped.values()) / item.parameter.element_size()
    size = item.parameter.numel()
    counted = OPTIMIZERS[kind].state_numbers(size, size, config(kind).used_momentum)
    assert numbers / size == pytest.approx(counted / size, abs=0.03)
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
    for step in range(6):
        gradient = torch.randn(90, 64, generator=torch.Generator().manual_seed(step))
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
    with pytest.raises(TypeError, match="RMSprop: no record"):
        fresh_states(torch.optim.RMSprop(groups, lr=1.0), trained[0].parameter)
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


PAGED = {kind: record for kind, record in OPTIMIZERS.items() if record.cpu_substitute}


@pytest.mark.parametrize("kind", PAGED)
def test_paged_states_are_refused_on_a_cpu(kind):
    message = f'"{kind}" needs a GPU; set "{PAGED[kind].cpu_substitute}"'
    with pytest.raises(ConfigError, match=message):
        build_optimizer(config(kind), fresh())


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", PAGED)
def test_paged_states_are_those_of_its_substitute(kind, monkeypatch):
    """bitsandbytes steps them on a CPU without pages: names, sizes and values are the same."""
    without = dataclasses.replace(PAGED[kind], cpu_substitute=None)
    monkeypatch.setitem(OPTIMIZERS, kind, without)
    paged, plain = fresh(), fresh()
    one, other = (
        build_optimizer(config(name), items)
        for name, items in ((kind, paged), (PAGED[kind].cpu_substitute, plain))
    )
    for optimizer, items in ((one, paged), (other, plain)):
        run(optimizer, items, range(20))
    for mine, its in zip(paged, plain, strict=True):
        torch.testing.assert_close(mine.parameter, its.parameter, rtol=1e-6, atol=1e-6)
    item = paged[0]
    stepped, started = tensors_of(one, item.parameter), fresh_states(one, item.parameter)
    assert stepped.keys() == started.keys() - {"qmap1", "qmap2"}
    size = item.parameter.numel()
    held = sum(value.nbytes for value in stepped.values()) / item.parameter.nbytes
    assert held == pytest.approx(without.state_numbers(size, size, 0.0) / size, abs=0.03)


def test_muon_leaves_tables_vectors_and_stacks_to_adamw():
    shapes = {
        "model.embed_tokens.weight": (32, 8),
        "lm_head.lora_A.default.weight": (4, 8),
        "model.layers.0.mlp.experts.down_proj": (2, 8, 8),
        "model.layers.0.norm.weight": (8,),
        "model.layers.0.up_proj.weight": (16, 8),
    }
    trained = [
        TrainedParameter(name, nn.Parameter(torch.randn(shape)), True)
        for name, shape in shapes.items()
    ]
    optimizer = build_optimizer(config("muon"), trained, tables=("model.embed_tokens", "lm_head"))
    run(optimizer, trained, range(2))
    names = {item.name: sorted(tensors_of(optimizer, item.parameter)) for item in trained}
    assert names.pop("model.layers.0.up_proj.weight") == ["momentum_buffer"]
    assert set(map(tuple, names.values())) == {("exp_avg", "exp_avg_sq", "step")}
    sizes = [item.parameter.numel() for item in trained]
    assert config("muon").record.state_numbers(sum(sizes), sizes[-1], 0.95) == sum(
        value.numel()
        for item in trained
        for name, value in tensors_of(optimizer, item.parameter).items()
        if name != "step"
    )


@pytest.mark.parametrize(("momentum", "states"), [(0.0, []), (0.5, ["momentum_buffer"])])
def test_sgd_holds_a_state_with_momentum_alone(momentum, states):
    trained, theirs = fresh(), fresh()
    settings = config("sgd", momentum=momentum, weight_decay=0.0)
    optimizer = build_optimizer(settings, trained)
    run(optimizer, trained, range(4))
    reference = torch.optim.SGD([item.parameter for item in theirs], lr=1.0, momentum=momentum)
    run(reference, theirs, range(4))
    for mine, its in zip(trained, theirs, strict=True):
        assert torch.equal(mine.parameter, its.parameter)
        assert list(tensors_of(optimizer, mine.parameter)) == states
    assert settings.record.state_numbers(10, 10, momentum) == 10 * len(states)


def test_momentum_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match=r'"adamw" has none .* set type to "muon" or "sgd"'):
        config("adamw", momentum=0.9)


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
    schedule = "constant" if kind == "adamw_schedule_free" else "cosine"
    check_layouts(training, optimizer__type=kind, scheduler__type=schedule)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "schedule"),
    [("muon", "warmup_stable_decay"), ("sgd", "rex"), ("adagrad", "log_sweep")],
)
def test_so_it_is_in_full_fine_tuning_with_every_new_schedule(training, kind, schedule):
    check_layouts(
        training,
        adapter__kind="none",
        optimizer__type=kind,
        scheduler__type=schedule,
        scheduler__min_lr=1e-6,
    )


@pytest.mark.exhaustive
def test_a_run_is_prolonged_from_before_its_fall(training):
    settings = {
        "scheduler__type": "warmup_stable_decay",
        "scheduler__decay_steps": 2,
        "checkpoint__every_steps": 2,
        "evaluation__before_first_step": False,
        "evaluation__after_last_step": False,
    }
    whole = training.run("whole", max_steps=8, **settings)
    longer = training.run("longer", max_steps=6, **settings)
    shutil.rmtree(longer / "checkpoints" / "step-000006")
    training.run("longer", 1, "--resume", "--data-changed=continue", max_steps=8, **settings)
    assert exact_metrics(longer) == exact_metrics(whole)
    found, tensors = checkpoint_tensors(longer), checkpoint_tensors(whole)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def check_layouts(training, **settings):
    """One stage, and two that are resumed as one, come to the same bits."""
    settings |= {"max_steps": 4, "checkpoint__every_steps": 2}
    one = training.run("one", 1, **settings)
    two = training.run("two", 2, pipeline_stages=2, **settings)
    assert exact_metrics(two) == exact_metrics(one)
    shutil.rmtree(two / "checkpoints" / "step-000004")
    training.run("two", 1, "--resume", **settings)
    assert exact_metrics(two) == exact_metrics(one)
    found, tensors = checkpoint_tensors(two), checkpoint_tensors(one)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
