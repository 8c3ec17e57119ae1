"""Products of an expert's rows, its gate and its routing, against float64 and one by one.

Without a GPU, Triton's interpreter runs the kernels.
"""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from headrace.kernels.dequantize import HQQ_WORDS, dequantize_hqq_reference
from headrace.kernels.experts.gate import Gate, gated, gated_gradient_reference, gated_reference
from headrace.kernels.experts.gate_triton import gated_gradient_pass, gated_pass
from headrace.kernels.experts.grouped_linear import grouped_linear
from headrace.kernels.experts.quantize_rows_triton import quantize_rows_pass
from headrace.kernels.experts.routing import gather_rows, route, sum_rows
from headrace.kernels.experts.routing_triton import sum_rows_pass
from headrace.kernels.fp8.rows import quantize_rows
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.quantized.formats import format_of
from headrace.trainer.quantized.selection import Quantization

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXPERTS, OUTPUTS, INPUTS, ROWS = 5, 48, 64, 40
SETTINGS = {
    "nf4": {"backend": "bnb"},
    "nf4, twice": {"backend": "bnb", "double_quantization": True},
    "fp4": {"backend": "bnb", "type": "fp4"},
    "int8": {"backend": "bnb", "type": "int8"},
    "hqq": {"backend": "hqq"},
    "hqq, 3 bits in rows": {"backend": "hqq", "bits": 3, "axis": 1, "group_size": 32},
    "fp8": {"backend": "fp8"},
    "nf4, multiplied in fp8": {"backend": "bnb", "matmul": "fp8"},
    "int8, multiplied in fp8": {"backend": "bnb", "type": "int8", "matmul": "fp8"},
}
GATES = {
    "silu": Gate(),
    "gpt_oss": Gate(interleaved=True, alpha=1.702, limit=1.5),
    "limited": Gate(alpha=1.3, limit=1.0),
}


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE)


def sorted_rows():
    """Groups of rows, one of which is empty."""
    groups = torch.tensor([0] * 7 + [1] * 16 + [3] * 16 + [4], device=DEVICE)
    offsets = torch.tensor([7, 23, 23, 39, 40], dtype=torch.int32, device=DEVICE)
    return groups, offsets


def stack_of(settings):
    config = QuantizationConfig(**settings)
    return Quantization(config).make(random(EXPERTS, OUTPUTS, INPUTS), "weight", torch.float32)


def relative(ours, exact):
    difference = ours.detach().double() - exact.detach()
    return float(difference.norm() / exact.detach().norm())


@pytest.mark.parametrize("rank", [OUTPUTS, 3])
def test_trained_matrices_equal_float64_forward_and_backward(rank):
    groups, offsets = sorted_rows()
    x, weight = random(ROWS, INPUTS, seed=1), random(EXPERTS, rank, INPUTS)
    ours = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    output = grouped_linear(*ours, offsets)
    gradient = random(ROWS, rank, seed=2)
    found = [output, *torch.autograd.grad(output, ours, gradient)]
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = torch.einsum("ri,roi->ro", exact[0], exact[1][groups])
    theirs = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    for value, reference in zip(found, theirs, strict=True):
        assert relative(value, reference) <= 3e-6
    assert not found[2][2].any(), "no rows, no gradient"


@pytest.mark.parametrize("kind", SETTINGS)
def test_quantized_stacks_equal_their_matrices_one_by_one(kind):
    groups, offsets = sorted_rows()
    held = stack_of(SETTINGS[kind])
    assert held.shape == (EXPERTS, OUTPUTS, INPUTS)
    x = random(ROWS, INPUTS, seed=1).requires_grad_()
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = held.grouped_linear(x, groups, offsets)
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in kept}
    assert sum(sizes.values()) <= held.nbytes + groups.nbytes + offsets.nbytes
    gradient = random(ROWS, OUTPUTS, seed=2)
    (found,) = torch.autograd.grad(output, x, gradient)
    exact = x.detach().double().requires_grad_()
    weight = held.dequantize(torch.float32).double()
    expected = torch.einsum("ri,roi->ro", exact, weight[groups])
    (theirs,) = torch.autograd.grad(expected, exact, gradient.double())
    tolerance = 0.05 if held.product_scales is not None else 3e-6  # of 8-bit floats' rounding
    assert relative(output, expected) <= tolerance
    assert relative(found, theirs) <= tolerance


@pytest.mark.parametrize("kind", [name for name in SETTINGS if name != "nf4, twice"])
def test_each_matrix_of_a_stack_has_the_bits_of_the_matrix_alone(kind):
    config = QuantizationConfig(**SETTINGS[kind])
    values = random(EXPERTS, OUTPUTS, INPUTS)
    whole = stack_of(SETTINGS[kind]).dequantize(torch.float32)
    for value, part in zip(values, whole, strict=True):
        alone = format_of(config).make(value, "weight", config, torch.float32)
        assert torch.equal(part, alone.dequantize(torch.float32))


@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_stacks_are_unpacked_in_triton_as_in_torch(axis):
    from headrace.kernels.dequantize_hqq_triton import dequantize_hqq_pass

    held = stack_of({"backend": "hqq", "bits": 3, "axis": axis, "group_size": 32})
    (codes, scale, zero), (bits, _) = held.packed
    expected = dequantize_hqq_reference(codes, scale, zero, bits, axis, held.shape, torch.float32)
    words = HQQ_WORDS[bits]
    found = dequantize_hqq_pass(codes, scale, zero, bits, words, axis, held.shape, torch.float32)
    torch.testing.assert_close(found, expected)


def gate_arguments(inner=20, dtype=torch.float32):
    states = (2 * random(ROWS, 2 * inner)).to(dtype)
    groups, _ = sorted_rows()
    return states, random(ROWS, seed=3), groups, random(EXPERTS, 2 * inner, seed=4)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", GATES)
def test_a_gates_gradient_is_the_one_of_autograd_in_torch_and_in_triton(kind, biased):
    gate = GATES[kind]
    states, weights, groups, bias = gate_arguments()
    bias = bias if biased else None
    inputs = states.requires_grad_(), weights.requires_grad_()
    expected = gated_reference(*inputs, groups, bias, gate)
    gradient = random(*expected.shape, seed=5)
    theirs = torch.autograd.grad(expected, inputs, gradient)
    output = gated(*inputs, groups, bias, gate)
    ours = torch.autograd.grad(output, inputs, gradient)
    numbers = gate.interleaved, gate.alpha, gate.limit or 0.0
    plain = states.detach(), weights.detach(), groups, bias
    reference = gated_gradient_reference(gradient, *plain, gate)
    triton = gated_gradient_pass(gradient, *plain, *numbers)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gated_pass(*plain, *numbers), expected)
    for found in (ours, reference, triton):
        torch.testing.assert_close(found, theirs)


def test_tokens_are_sorted_by_expert_and_summed_in_their_own_order():
    chosen = torch.tensor([[4, 0], [1, 0], [1, 3], [0, 4]], device=DEVICE)
    routing = route(chosen, EXPERTS)
    assert routing.tokens.tolist() == [0, 1, 3, 1, 2, 2, 0, 3]
    assert routing.experts.tolist() == [0, 0, 0, 1, 1, 3, 4, 4]
    assert routing.offsets.tolist() == [3, 5, 5, 6, 8]
    x = random(4, 16).requires_grad_()
    rows = gather_rows(x, routing.tokens, routing.places)
    assert torch.equal(rows, x[routing.tokens])
    total = sum_rows(rows * rows.detach(), routing.tokens, routing.places)
    torch.testing.assert_close(total, 2 * x * x)
    (gradient,) = torch.autograd.grad(total.sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach())
    torch.testing.assert_close(sum_rows_pass(rows.detach(), routing.places), 2 * x.detach())


@pytest.mark.parametrize("factored", [False, True])
def test_rows_are_quantized_in_triton_as_in_torch(factored):
    groups, _ = sorted_rows()
    x, factors = random(ROWS, 48), random(EXPERTS, 48, seed=1)
    x[3] = 0
    codes, scales = quantize_rows_pass(x, factors if factored else None, groups)
    expected, expected_scales = quantize_rows(x * factors[groups] if factored else x)
    torch.testing.assert_close(scales, expected_scales)
    ours, theirs = codes.float(), expected.float()
    # the interpreter does not carry a rounding into the exponent; GPUs do, and divide faster
    right = theirs.abs().log2().frac() != 0 if DEVICE.type == "cpu" else theirs == theirs
    assert right.float().mean() > 0.5
    assert (ours == theirs)[right].float().mean() >= (1 if DEVICE.type == "cpu" else 0.99)
    assert not codes[3].float().any()
