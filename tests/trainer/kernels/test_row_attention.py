"""Rows of one document each attend causally, their slices to all earlier keys too."""

import pytest
import torch

from headrace.kernels.attention.row_attention import row_attention, row_attention_reference

TOKENS, SIZE = 12, 16


def tensors(keys, value_size=SIZE, device="cpu", scale=1):
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(2, 4, TOKENS * scale, SIZE * scale), (2, 2, keys * scale, SIZE * scale)]
    shapes += [(2, 2, keys * scale, value_size * scale), (4,)]
    made = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    return [x.requires_grad_() for x in made]


def attend_one_by_one(query, key, value, sinks):
    """Each token's attention by the definition, in float64."""
    query, key, value = (x.double() for x in (query, key, value))
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    before = key.shape[2] - query.shape[2]
    for row, head, token in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        seen = slice(0, before + token + 1)
        scores = key[row, head // 2, seen] @ query[row, head, token] * 0.3
        if sinks is not None:
            scores = torch.cat([scores, sinks[head : head + 1].double()])
        shares = scores.softmax(0)[: before + token + 1]
        output[row, head, token] = shares @ value[row, head // 2, seen]
    return output


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("keys", [TOKENS, TOKENS + 7])
@pytest.mark.parametrize("value_size", [SIZE, 8])
def test_tokens_attend_to_all_up_to_them_and_a_sink(keys, value_size, with_sinks):
    *states, sinks = tensors(keys, value_size)
    sinks = sinks if with_sinks else None
    leaves = [*states, *([sinks] if with_sinks else [])]
    expected = attend_one_by_one(*states, sinks)
    given = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(expected, leaves, given.double())
    for way in (row_attention, row_attention_reference):
        found = way(*states, scale=0.3, sinks=sinks)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        mine = torch.autograd.grad(found, leaves, given)
        for gradient, other in zip(mine, gradients, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_operators_are_what_torch_says_of_them():
    *states, sinks = tensors(TOKENS + 7)
    settings = {"test_utils": ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")}
    torch.library.opcheck(torch.ops.headrace.row_attention, (*states, 0.3, sinks), **settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("keys", [TOKENS, 2 * TOKENS])
def test_a_gpu_attends_as_the_twin(keys, with_sinks):
    *states, sinks = tensors(keys, device="cuda", scale=8)
    sinks = sinks if with_sinks else None
    found = []
    for dtype, way in ((torch.bfloat16, row_attention), (torch.float32, row_attention_reference)):
        made = [x.detach().bfloat16().to(dtype).requires_grad_() for x in states]
        leaves = [*made, *([sinks] if with_sinks else [])]
        output = way(*made, scale=0.1, sinks=sinks)
        given = torch.ones_like(output).cumsum(-1) / 8
        found.append([output, *torch.autograd.grad(output, leaves, given)])
    for mine, theirs in zip(*found, strict=True):
        assert (mine.float() - theirs).norm() <= 1e-2 * theirs.norm()
