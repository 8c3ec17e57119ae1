"""RMSNorm and rotary embedding equal float64, forward and backward, in torch and in Triton.

Without a GPU, Triton's interpreter runs the kernels.
"""

import math

import pytest
import torch

from headrace.kernels import rms_norm_triton
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.rotary import rotary, rotary_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NORMS = {
    "llama": {},
    "olmo2": {"rounds_first": False},
    "gemma": {"offset": 1.0, "rounds_first": False},
}
each_norm = pytest.mark.parametrize("kind", NORMS.values(), ids=NORMS)


@pytest.fixture(params=["torch", "triton"])
def triton(request):
    return request.param == "triton"


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def differentiated(function, inputs, gradients, wanted, **settings):
    """What a function gives, and the gradients of those inputs that are wanted."""
    inputs = [
        x.detach().clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)
    ]
    outputs = function(*inputs, **settings)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    found = torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], gradients)
    return [*(x.detach() for x in outputs), *found]


def norm(x, weight, **settings):
    return rms_norm(x, weight, 1e-5, **settings)


def doubled(tensors):
    return [x.double() for x in tensors]


def assert_near(values, expected, tolerance):
    """Relative to the whole of each tensor."""
    for value, reference in zip(values, expected, strict=True):
        error = torch.linalg.vector_norm(value.double() - reference)
        assert error <= tolerance * torch.linalg.vector_norm(reference)


@each_norm
@pytest.mark.parametrize("shape", [(2, 25, 24), (3, 3, 128)], ids=str)  # 24 is not a power of 2
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_the_norm_equals_float64(monkeypatch, kind, shape, trained, triton):
    monkeypatch.setattr(rms_norm_triton, "TILE", 256)  # many programs, the last not full
    monkeypatch.setattr(rms_norm_triton, "TRAINED_TILES", 3)
    inputs, gradient = [random(*shape), random(shape[-1], seed=1)], [random(*shape, seed=2)]
    wanted = [True, trained]
    ours = differentiated(norm, inputs, gradient, wanted, triton=triton, **kind)
    expected = differentiated(norm, doubled(inputs), doubled(gradient), wanted, **kind)
    assert len(ours) == 2 + trained
    assert_near(ours, expected, 1e-6)


@pytest.mark.parametrize(
    ("kind", "weight_type"),
    [("llama", torch.bfloat16), ("llama", torch.float32), ("gemma", torch.float32)],
)
def test_the_norm_in_bfloat16_equals_its_twin_to_rounding(kind, weight_type):
    inputs = [random(9, 64, dtype=torch.bfloat16), random(64, seed=1, dtype=weight_type)]
    gradient, wanted = [random(9, 64, seed=2)], [True, True]
    ours = differentiated(norm, inputs, gradient, wanted, triton=True, **NORMS[kind])
    twin = differentiated(norm, inputs, gradient, wanted, **NORMS[kind])
    assert [x.dtype for x in ours] == [x.dtype for x in twin]
    assert_near(ours, doubled(twin), 1e-2)  # the interpreter rounds towards zero


def angles(b, s, size):
    """As transformers makes them for positions that restart."""
    turns = torch.arange(s).remainder(7).outer(1e4 ** -(torch.arange(0, size, 2) / size))
    both = torch.cat([turns, turns], dim=-1).expand(b, s, size).to(DEVICE)
    return both.cos(), both.sin()


@pytest.mark.parametrize("size", [8, 12])
def test_rotary_embedding_equals_float64(size, triton):
    inputs = [random(2, 9, 6, size), random(2, 9, 2, size, seed=1), *angles(2, 9, size)]
    gradients = [random(*inputs[0].shape, seed=2), random(*inputs[1].shape, seed=3)]
    wanted = [True, True, False, False]
    ours = differentiated(rotary, inputs, gradients, wanted, triton=triton)
    expected = differentiated(rotary_reference, doubled(inputs), doubled(gradients), wanted)
    assert_near(ours, expected, 1e-6)


def test_heads_may_lie_in_another_order():
    """As attention hands gradients back: heads before tokens."""
    query, key = (random(2, heads, 9, 8, seed=heads).transpose(1, 2) for heads in (4, 2))
    turned = rotary(query, key, *angles(2, 9, 8), triton=True)
    expected = rotary(query.contiguous(), key.contiguous(), *angles(2, 9, 8))
    torch.testing.assert_close(turned, expected)


def test_what_was_turned_keeps_its_length_and_its_input():
    query, key = random(1, 5, 2, 8), random(1, 5, 1, 8, seed=1)
    before = query.clone()
    turned, _ = rotary(query, key, *angles(1, 5, 8), triton=True)
    assert torch.equal(query, before) and not torch.equal(turned[:, 1:], query[:, 1:])
    assert math.isclose(turned.norm(), query.norm(), rel_tol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_compiled_code_takes_the_kernels_in_without_a_break(trained):
    def layer(x, weight, cosine, sine, **settings):
        normed = rms_norm(x + 1, weight, 1e-5, **settings).unflatten(-1, (6, 16))
        return rotary(normed[:, :, :4] * 2, normed[:, :, 4:], cosine, sine, **settings)

    inputs = [random(2, 32, 96), random(96, seed=1), *angles(2, 32, 16)]
    inputs = [x.to(torch.bfloat16) for x in inputs]
    gradients, wanted = [random(2, 32, 4, 16), random(2, 32, 2, 16)], [True, trained, False, False]
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    ours = differentiated(compiled, inputs, gradients, wanted, triton=True)
    expected = differentiated(layer, doubled(inputs), gradients, wanted)
    assert_near(ours, expected, 1e-2)
