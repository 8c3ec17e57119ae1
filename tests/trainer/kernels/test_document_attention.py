"""Attention within documents is a softmax over what each token sees, with windows and sinks."""

import pytest
import torch

from headrace.kernels.attention.document_attention import (
    document_attention,
    document_attention_reference,
    visible_keys,
)
from headrace.kernels.attention.flex_attention import block_mask

BOUNDS = torch.tensor([0, 7, 8, 24], dtype=torch.int32)
TOKENS, SIZE = 24, 16


def tensors(value_size=SIZE, heads=4, key_heads=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, heads, SIZE), (TOKENS, key_heads, SIZE), (TOKENS, key_heads, value_size)]
    made = [torch.randn(shape, generator=generator) for shape in (*shapes, (heads,))]
    return [x.requires_grad_() for x in made]


def attend_one_by_one(query, key, value, sinks, window):
    """Each token's attention by the definition, in float64."""
    rows = []
    query, key, value, sinks = (x.double() for x in (query, key, value, sinks))
    for token in range(TOKENS):
        start = max(int(bound) for bound in BOUNDS if bound <= token)
        if window is not None:
            start = max(start, token - window + 1)
        heads = []
        for head in range(query.shape[1]):
            group = head // (query.shape[1] // key.shape[1])
            scores = key[start : token + 1, group] @ query[token, head] * 0.3
            shares = torch.cat([scores, sinks[head : head + 1]]).softmax(0)[:-1]
            heads.append(shares @ value[start : token + 1, group])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("value_size", [SIZE, 8])
def test_each_token_attends_to_its_document_and_a_sink(window, value_size):
    *states, sinks = tensors(value_size)
    settings = {"scale": 0.3, "window": window, "sinks": sinks}
    expected = attend_one_by_one(*states, sinks, window)
    given = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(expected, (*states, sinks), given.double())
    ways = (
        document_attention(*states, BOUNDS, TOKENS, **settings),
        document_attention_reference(*states, BOUNDS, **settings),
    )
    for found in ways:
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(
            torch.autograd.grad(found, (*states, sinks), given), gradients, strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_without_sinks_it_is_torchs_attention_of_each_document(window):
    query, key, value, _ = tensors()
    found = document_attention(query, key, value, BOUNDS, TOKENS, scale=0.3, window=window)
    for start, end in zip(BOUNDS[:-1].tolist(), BOUNDS[1:].tolist(), strict=True):
        parts = [x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value)]
        size = end - start
        seen = torch.ones(size, size, dtype=torch.bool).tril()
        if window is not None:
            seen &= ~torch.ones(size, size, dtype=torch.bool).tril(-window)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *parts, attn_mask=seen, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(found[start:end], expected[0].transpose(0, 1))


@pytest.mark.parametrize("window", [None, 5])
def test_a_slice_of_rows_attends_to_what_it_would_in_whole_ones(window):
    """Tokens 10 to 19, and the keys of their document from its start at 8 on."""
    query, key, value, sinks = tensors()
    settings = {"scale": 0.3, "window": window, "sinks": sinks}
    given = torch.randn((10, 4, SIZE), generator=torch.Generator().manual_seed(1))
    whole = document_attention(query, key, value, BOUNDS, TOKENS, **settings)[10:20]
    expected = torch.autograd.grad(whole, (query, key, value, sinks), given)
    bounds, keys = (torch.tensor([0, size], dtype=torch.int32) for size in (10, 12))
    for way, places in (
        (document_attention, {"key_bounds": keys, "longest_keys": 12}),
        (document_attention_reference, {"key_bounds": keys}),
    ):
        longest = [10] if way is document_attention else []
        found = way(query[10:20], key[8:20], value[8:20], bounds, *longest, **settings, **places)
        torch.testing.assert_close(found, whole)
        mine = torch.autograd.grad(found, (query, key, value, sinks), given)
        for gradient, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 100])
def test_on_a_gpu_a_slice_attends_as_by_the_twin(window):
    """The last 300 tokens of a document of 500, and 212 of the next."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((512, 4, 64), (712, 2, 64), (712, 2, 64))
    made = [torch.randn(s, generator=generator, device="cuda").bfloat16() for s in shapes]
    places = [[0, 300, 512], [0, 500, 712]]
    bounds, keys = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in places)
    given = torch.randn(shapes[0], generator=generator, device="cuda")
    found = []
    for states in ([x.requires_grad_() for x in made], [x.detach().float() for x in made]):
        settings = {"scale": 0.125, "window": window, "key_bounds": keys}
        if states[0].dtype == torch.bfloat16:
            output = document_attention(*states, bounds, 512, longest_keys=712, **settings)
        else:
            states = [x.requires_grad_() for x in states]
            output = document_attention_reference(*states, bounds, **settings)
        found.append([output, *torch.autograd.grad(output, states, given.to(output.dtype))])
    for mine, theirs in zip(*found, strict=True):
        assert (mine.float() - theirs).norm() <= 1e-2 * theirs.norm()


def test_blocks_of_a_slice_hold_what_its_tokens_see():
    """Two documents of 300 tokens: a slice has the last 100 of one and the first of the next."""
    bounds = torch.tensor([0, 100, 200], dtype=torch.int32)
    keys = torch.tensor([0, 300, 400], dtype=torch.int32)
    first, last = visible_keys(bounds, keys, 200, -1)
    assert (first[0], last[0], last[99], first[100], last[100]) == (0, 200, 299, 300, 300)
    mask = block_mask(first, last, 400)
    places = torch.arange(400)
    seen = (places >= first.unsqueeze(1)) & (places <= last.unsqueeze(1))
    for row, tokens in enumerate(seen.split(128)):
        blocks = [bool(part.any()) for part in tokens.split(128, dim=1)]
        whole = [bool(part.all()) for part in tokens.split(128, dim=1)]
        found = mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist()
        all_of = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist()
        assert sorted(found + all_of) == [n for n, any_of in enumerate(blocks) if any_of]
        assert set(all_of) == {n for n, every in enumerate(whole) if every}


def test_a_soft_cap_bounds_the_scores():
    query, key, value, _ = tensors()
    states = (query * 100, key, value)
    found = document_attention_reference(*states, BOUNDS, scale=1.0, softcap=1e-4)
    mean = torch.cat(
        [
            value[a:b].cumsum(0) / torch.arange(1, b - a + 1).view(-1, 1, 1)
            for a, b in zip(BOUNDS[:-1].tolist(), BOUNDS[1:].tolist(), strict=True)
        ]
    ).repeat_interleave(2, dim=1)
    torch.testing.assert_close(found, mean, rtol=1e-3, atol=1e-3)


def test_torchs_checks_of_an_operator_hold():
    *states, sinks = tensors()
    torch.library.opcheck(
        torch.ops.headrace.document_attention.default,
        (*states, BOUNDS, BOUNDS, TOKENS, TOKENS, 0.3, 5, sinks),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
