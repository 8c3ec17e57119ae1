"""Gradients: tied copies summed, the norm the same for any cut, only large ones clipped."""

import math

import pytest
import torch
from alone import layout_of_one
from torch import nn

from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.building.materializer import TrainedParameter
from headrace.trainer.optim import gradients


@pytest.fixture
def layout():
    with layout_of_one() as alone:
        yield alone


def parameter(*gradient):
    """A parameter with this gradient, or without one."""
    made = nn.Parameter(torch.zeros(len(gradient)))
    made.grad = torch.tensor(gradient) if gradient else None
    return made


def built(trained, tied_head=None):
    return BuiltStage(
        chunks=[],
        trained=trained,
        tied_copy=None if tied_head is None else trained[0].parameter,
        tied_head=tied_head,
        model_config=None,
        method=None,
        layers=[],
        architecture=None,
        skeleton=None,
    )


def random_parameters(count):
    torch.manual_seed(0)
    named = [(f"layer.{index}", nn.Parameter(torch.zeros(3, 5))) for index in range(count)]
    for index, (_, made) in enumerate(named):
        made.grad = torch.randn(3, 5) * 10.0 ** (index - count // 2)
    return [TrainedParameter(name, made, owned=True) for name, made in named]


@pytest.mark.parametrize("largest", [5.0, 5.1, 0])
def test_a_gradient_within_the_limit_is_left_alone_and_0_is_no_limit(largest):
    one, other = parameter(3.0), parameter(0.0, 4.0)
    gradients.clip([one, other], 5.0, largest)
    assert one.grad.tolist() == [3.0]
    assert other.grad.tolist() == [0.0, 4.0]


def test_a_large_gradient_is_scaled_to_the_limit_and_keeps_its_direction():
    one, other, without = parameter(3.0), parameter(0.0, 4.0), parameter()
    gradients.clip([one, other, without], 5.0, 0.5)
    assert one.grad.tolist() == pytest.approx([0.3])
    assert other.grad.tolist() == pytest.approx([0.0, 0.4])
    assert without.grad is None


def test_the_norm_is_that_of_all_owned_gradients_together(layout):
    trained = random_parameters(8)
    copy = TrainedParameter("copy", parameter(100.0), owned=False)
    expected = math.sqrt(sum(item.parameter.grad.double().square().sum() for item in trained))
    norm = gradients.global_norm(built([*trained, copy]), layout)
    assert norm == pytest.approx(expected, rel=1e-6)


def test_a_stage_without_trained_parameters_has_norm_0(layout):
    assert gradients.global_norm(built([]), layout) == 0


def test_a_parameter_that_nothing_used_adds_nothing_to_the_norm(layout):
    trained = [
        TrainedParameter(n, p, owned=True)
        for n, p in (("a", parameter(3.0, 4.0)), ("b", parameter()))
    ]
    assert gradients.global_norm(built(trained), layout) == 5.0


def test_a_stage_without_gradients_is_clipped_beside_others():
    gradients.clip([], 5.0, 0.5)
    gradients.clip([parameter()], 5.0, 0.5)


@pytest.mark.parametrize("cut", range(1, 9))
def test_the_norm_is_bitwise_the_same_wherever_the_model_is_cut(layout, monkeypatch, cut):
    trained = random_parameters(9)
    whole = gradients.global_norm(built(trained), layout)

    first = [float(torch.linalg.vector_norm(item.parameter.grad)) for item in trained[:cut]]
    monkeypatch.setattr(gradients, "gather", lambda norms, group: [first, norms])
    assert gradients.global_norm(built(trained[cut:]), layout) == whole


def test_a_tied_embedding_of_one_stage_gets_the_gradient_of_its_head_as_well(layout):
    embedding, head = parameter(1.0, 2.0), parameter(10.0, 20.0)
    trained = [TrainedParameter("model.embed_tokens.weight", embedding, owned=True)]
    gradients.sum_tied(built(trained, tied_head=head), layout)
    assert embedding.grad.tolist() == [11.0, 22.0]
    assert head.grad is None


def test_half_a_tied_embedding_without_a_gradient_counts_as_zeros(layout):
    embedding, head = parameter(1.0, 2.0), parameter(10.0, 20.0)
    head.grad = None
    trained = [TrainedParameter("model.embed_tokens.weight", embedding, owned=True)]
    gradients.sum_tied(built(trained, tied_head=head), layout)
    assert embedding.grad.tolist() == [1.0, 2.0]
