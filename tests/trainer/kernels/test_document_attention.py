"""Attention within documents is a softmax over what each token sees, with windows and sinks."""

import pytest
import torch

from headrace.kernels.attention.document_attention import (
    document_attention,
    document_attention_reference,
)

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
        (*states, BOUNDS, TOKENS, 0.3, 5, sinks),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
