"""Linear layers of 8-bit floats: right to the rounding of e4m3, and nothing kept but the weight."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cosine_similarity

from headrace.kernels.fp8.linear import (
    fp8_linear,
    fp8_trained_linear,
    scaled_product,
    scaled_product_reference,
)
from headrace.kernels.fp8.rows import E4M3, LARGEST, quantize_rows
from headrace.schemas.errors import ConfigError
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.quantized.selection import Quantization

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OUTPUTS, INPUTS, TOKENS = 96, 64, 48


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)


@pytest.fixture
def weight():
    codes, scales = quantize_rows(random(OUTPUTS, INPUTS, scale=0.02))
    return codes, scales.squeeze(1)


def linear(x, codes, scales, bias=None):
    return fp8_linear(x, bias, [codes, scales], "fp8", codes.shape, [], scales)


def relative(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()


def test_codes_are_within_half_a_step_of_e4m3_and_reach_its_largest_number():
    x = random(TOKENS, INPUTS)
    codes, scales = quantize_rows(x)
    assert codes.dtype == E4M3
    assert torch.equal(codes.float().abs().amax(1), torch.full((TOKENS,), LARGEST, device=DEVICE))
    error = (codes.float() * scales - x).abs()
    assert (error <= x.abs() / 16 + scales * 2**-10).all()  # 3 bits of mantissa, least exponent -6


def test_one_large_row_leaves_the_others_as_they_are_and_zeros_stay_zeros():
    x = random(TOKENS, INPUTS)
    x[3] *= 1e6
    x[5] = 0
    codes, scales = quantize_rows(x)
    alone, scale = quantize_rows(x[7:8])
    assert torch.equal(codes[7:8].float(), alone.float()) and torch.equal(scales[7:8], scale)
    assert not codes[5].float().any()


def test_forward_and_backward_are_those_of_float64_to_e4m3s_rounding(weight):
    codes, scales = weight
    exact = codes.double() * scales.double()[:, None]
    x = random(2, TOKENS, INPUTS, seed=1).requires_grad_()
    bias = random(OUTPUTS, seed=2)
    output = linear(x, codes, scales, bias)
    gradient = random(*output.shape, seed=3)
    output.backward(gradient)
    assert x.grad is not None
    assert relative(output, x.detach().double() @ exact.T + bias.double()) < 0.03
    expected = gradient.double() @ exact
    assert relative(x.grad, expected) < 0.04
    assert cosine_similarity(x.grad.double().flatten(), expected.flatten(), 0) > 0.999


def test_the_product_is_that_of_the_rounded_numbers():
    a, a_scales = quantize_rows(random(TOKENS, INPUTS))
    b, b_scales = quantize_rows(random(OUTPUTS, INPUTS, seed=1))
    exact = (a.double() * a_scales) @ (b.double() * b_scales).T
    arguments = (a, b, a_scales, b_scales.squeeze(1))
    assert relative(scaled_product_reference(*arguments, torch.float32), exact) < 1e-6
    assert relative(scaled_product(*arguments, torch.bfloat16), exact) < 4e-3


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_it_is_the_same_and_keeps_nothing_but_the_weight(weight, recomputed):
    codes, scales = weight
    saved = []

    def function(x):
        return linear(torch.tanh(linear(x, codes, scales))[:, :INPUTS], codes, scales)

    def run(function):
        x = random(TOKENS, INPUTS, seed=1).requires_grad_()
        if recomputed:
            output = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
        else:
            output = function(x)
        output.square().sum().backward()
        return output, x.grad

    torch._dynamo.reset()
    plain = run(function)
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compiled = run(torch.compile(function, backend="aot_eager", fullgraph=True))
    for value, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(value, expected)
    assert saved
    copies = [t for t in saved if t.dtype == E4M3 and t.data_ptr() != codes.data_ptr()]
    assert not copies


def test_a_trained_weight_has_a_gradient_of_the_input_as_it_was():
    weight = random(OUTPUTS, INPUTS, scale=0.02).requires_grad_()
    x = random(2, TOKENS, INPUTS, seed=1).requires_grad_()
    output = fp8_trained_linear(x, weight, None)
    gradient = random(*output.shape, seed=3)
    output.backward(gradient)
    exact, flat = weight.detach().double(), gradient.double().flatten(0, 1)
    assert relative(output, x.detach().double() @ exact.T) < 0.05
    assert relative(x.grad, gradient.double() @ exact) < 0.05
    assert relative(weight.grad, flat.T @ x.detach().double().flatten(0, 1)) < 1e-3


OVER = {
    "nf4": {"backend": "bnb"},
    "nf4, twice": {"backend": "bnb", "double_quantization": True},
    "fp4": {"backend": "bnb", "type": "fp4"},
    "int8": {"backend": "bnb", "type": "int8"},
    "hqq": {"backend": "hqq"},
}


@pytest.mark.parametrize("name", OVER)
def test_over_other_formats_it_is_what_their_numbers_give(name):
    config = QuantizationConfig(**OVER[name], matmul="fp8")
    held = Quantization(config).make(random(OUTPUTS, INPUTS), "weight", torch.bfloat16)
    exact = held.dequantize(torch.float32).double()
    x = random(TOKENS, INPUTS, seed=1).requires_grad_()
    output = held.linear(x, None)
    gradient = random(*output.shape, seed=3)
    output.backward(gradient)
    assert 1e-3 < relative(output, x.detach().double() @ exact.T) < 0.04
    assert relative(x.grad, gradient.double() @ exact) < 0.05
    held_bits = 8 * held.nbytes / exact.numel()
    assert Quantization(config).bits("weight", exact.shape) == pytest.approx(held_bits, rel=0.01)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bits_become_e4m3_in_triton_as_in_torch(name, transposed):
    from headrace.kernels.dequantize import _four_bit_table
    from headrace.kernels.dequantize_e4m3_triton import four_bit_e4m3, scaled_e4m3

    config = QuantizationConfig(**OVER[name])
    held = Quantization(config).make(random(OUTPUTS, 192), "weight", torch.float32)
    exact = held.dequantize(torch.float32)
    scales = exact.abs().amax(1) / LARGEST
    parts, settings = held.packed
    arguments = (parts[1], _four_bit_table(name, DEVICE), settings[0], held.shape, scales)
    found = four_bit_e4m3(parts[0], *arguments, transposed=transposed).float()
    same = scaled_e4m3(exact, scales, transposed=transposed).float()
    expected = (exact / scales[:, None]).to(E4M3).float()
    expected = expected.T if transposed else expected
    # the interpreter does not carry a rounding into the exponent; GPUs do
    right = expected.abs().log2().frac() != 0 if DEVICE.type == "cpu" else expected == expected
    assert right.float().mean() > 0.5
    assert torch.equal(found[right], expected[right])
    assert torch.equal(same[right], expected[right])


def test_a_shape_that_the_matrix_units_cannot_multiply_is_refused_by_name():
    config = QuantizationConfig(backend="fp8")
    with pytest.raises(ConfigError, match="gate is 40 x 32, which are not multiples of 16"):
        Quantization(config).bits("gate", torch.Size((40, 32)))
