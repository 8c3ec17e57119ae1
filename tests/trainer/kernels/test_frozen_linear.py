"""Linear layers over quantized weights: exact to rounding, and nothing dequantized is kept.

Without a GPU, Triton's interpreter runs the kernel.
"""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from headrace.kernels import frozen_linear as kernel
from headrace.kernels.dequantize import HQQ_WORDS, dequantize_hqq_reference
from headrace.kernels.lora_linear import lora_linear
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.quantized.formats import format_of
from headrace.trainer.quantized.nf4 import Nf4
from headrace.trainer.stored.bitsandbytes_library import bitsandbytes_functions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OUTPUTS, INPUTS, RANK = 48, 64, 3
SETTINGS = {
    "nf4": {"backend": "bnb"},
    "nf4, twice": {"backend": "bnb", "double_quantization": True},
    "nf4 in bfloat16": {"backend": "bnb", "storage_type": "bfloat16"},
    "fp4": {"backend": "bnb", "type": "fp4"},
    "int8": {"backend": "bnb", "type": "int8"},
    "hqq": {"backend": "hqq"},
    "hqq, 3 bits in rows": {"backend": "hqq", "bits": 3, "axis": 1, "group_size": 32},
}


def matrix(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(OUTPUTS, INPUTS, generator=generator).to(DEVICE)


def quantized(settings, dtype=torch.float32):
    config = QuantizationConfig(**settings)
    return format_of(config).make(matrix(), "weight", config, dtype)


@pytest.fixture
def held(request):
    return quantized(SETTINGS[request.param])


each = pytest.mark.parametrize("held", SETTINGS, indirect=True)


def layer_with_adapter(held, x, bias, down, up):
    return lora_linear(x, held.linear(x, bias), down, up, 0.5)


@each
def test_with_an_adapter_it_equals_float64_forward_and_backward(held):
    x = torch.randn(2, 5, INPUTS, device=DEVICE, requires_grad=True)
    bias = torch.randn(OUTPUTS, device=DEVICE)
    down = torch.randn(RANK, INPUTS, device=DEVICE, requires_grad=True)
    up = torch.randn(OUTPUTS, RANK, device=DEVICE, requires_grad=True)
    output = layer_with_adapter(held, x, bias, down, up)
    gradient = torch.randn_like(output)
    ours = [output, *torch.autograd.grad(output, (x, down, up), gradient)]

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, down, up)]
    weight = held.dequantize(torch.float32).double()
    expected = exact[0] @ weight.T + bias.double() + 0.5 * (exact[0] @ exact[1].T) @ exact[2].T
    theirs = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    for value, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("held", "compiled"),
    [*((name, False) for name in SETTINGS), ("nf4, twice", True)],
    indirect=["held"],
)
def test_a_weight_is_dequantized_once_each_way_and_not_kept(monkeypatch, held, compiled):
    counted, saved = [], []
    dequantize = kernel.dequantize

    def counting(*arguments):
        counted.append(arguments)
        return dequantize(*arguments)

    monkeypatch.setattr(kernel, "dequantize", counting)
    function = layer_with_adapter
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, INPUTS, device=DEVICE, requires_grad=True)
    down = torch.randn(RANK, INPUTS, device=DEVICE, requires_grad=True)
    up = torch.randn(OUTPUTS, RANK, device=DEVICE, requires_grad=True)

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function(held, x, None, down, up)
    assert len(counted) == 1
    assert saved
    assert not any(t.is_floating_point() and t.numel() == held.shape.numel() for t in saved)
    output.sum().backward()
    assert len(counted) == 2


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_hqq_is_unpacked_as_by_hqq_itself_and_in_triton(bits, axis):
    from hqq.core.quantize import Quantizer

    from headrace.kernels.dequantize_hqq_triton import dequantize_hqq_pass

    settings = {"nbits": bits, "axis": axis, "group_size": 32}
    packed, meta = Quantizer.quantize(matrix(), **settings, device=str(DEVICE))
    meta["compute_dtype"] = torch.float32
    expected = Quantizer.dequantize(packed, meta)
    arguments = (packed, meta["scale"], meta["zero"], bits, axis, (OUTPUTS, INPUTS))
    assert torch.equal(dequantize_hqq_reference(*arguments, torch.float32), expected)
    of_words = (*arguments[:4], HQQ_WORDS[bits], *arguments[4:])
    assert torch.equal(dequantize_hqq_pass(*of_words, torch.float32), expected)
    half = dequantize_hqq_pass(*of_words, torch.bfloat16)  # the interpreter cuts off, GPUs round
    torch.testing.assert_close(half.float(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_int8_activations_are_bitsandbytes_own(threshold):
    functions = bitsandbytes_functions()
    held = quantized(SETTINGS["int8"])
    x = torch.randn(2, 5, INPUTS, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours = held.linear(x, None, threshold)
    flat = x.view(-1, INPUTS)
    codes, rows, columns = functions.int8_vectorwise_quant(flat.half(), threshold)
    assert (columns is not None and columns.numel() > 0) == (threshold > 0)
    weight = held.dequantize(torch.float32)
    rounded = codes.float() * rows[:, None] / 127
    if threshold:
        rounded[:, columns] = flat[:, columns]
    torch.testing.assert_close(ours.view(-1, OUTPUTS), rounded @ weight.T, rtol=1e-4, atol=1e-3)
    whole = held.linear(x, None)
    assert (ours - whole).abs().max() > 1e-3, "activations were not quantized"


def test_pieces_are_quantized_as_the_whole_is_by_bitsandbytes():
    functions = bitsandbytes_functions()
    codes, state = functions.quantize_4bit(matrix(), quant_type="nf4", compress_statistics=True)
    config = QuantizationConfig(**SETTINGS["nf4, twice"])
    held = Nf4.make(matrix(), "weight", config, torch.float32, piece=7 * 64)
    nested = state.state2
    whole = [codes, state.absmax, nested.code, nested.absmax, state.offset]
    for part, expected in zip(held.buffers_by_name.values(), whole, strict=True):
        assert torch.equal(part, expected)


@each
def test_rows_of_an_embedding_are_those_of_the_whole(held):
    ids = torch.tensor([[3, 0, 47], [5, 5, 1]], device=DEVICE)
    whole = held.dequantize(torch.float32)
    assert torch.equal(held.rows(ids, torch.float32), whole[ids])
