"""Time of one layer's attention, forward and backward, by kernel, shape and documents.

`python tests/benchmarks/attention_rates.py [NAME ...]` on a GPU. Each way is compared with plain
torch in float32 first; then the median time of each is printed as a JSON line.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn import functional

from headrace.kernels.attention.document_attention import (
    document_attention,
    document_attention_reference,
    visible_keys,
)
from headrace.kernels.attention.flex_attention import block_mask, flex_document_attention
from headrace.kernels.attention.row_attention import row_attention

ROW, ROWS, REPEATS = 4096, 2, 20
SLICE = 1024  # tokens
PACKED = [900, 60, 512, 300, 28, 1200, 96, 400, 600]  # of one row, 455 on average


@dataclass(frozen=True)
class Shape:
    """One layer's attention."""

    heads: int
    key_heads: int
    size: int
    value_size: int
    window: int | None = None
    sinks: bool = False
    softcap: float | None = None


SHAPES = {
    "llama": Shape(32, 8, 128, 128),
    "qwen3_moe": Shape(32, 4, 128, 128),
    "gemma3": Shape(16, 8, 256, 256),
    "gemma3, window": Shape(16, 8, 256, 256, window=1024),
    "gpt_oss": Shape(64, 8, 64, 64, sinks=True),
    "gpt_oss, window": Shape(64, 8, 64, 64, window=128, sinks=True),
    "deepseek_v3": Shape(32, 32, 192, 128),
    "gemma2": Shape(16, 8, 256, 256, softcap=50.0),
    "gemma2, window": Shape(16, 8, 256, 256, window=2048, softcap=50.0),
}
FLEX = torch.compile(flex_document_attention, dynamic=False)


def bounds_of(packed: bool) -> Tensor:
    lengths = [*PACKED * ROWS] if packed else [ROW] * ROWS
    assert sum(lengths) == ROW * ROWS
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")


def ways(shape: Shape, bounds: Tensor, packed: bool) -> dict[str, Callable[..., Tensor]]:
    """Return the functions of query, key, value and sinks that compute a shape."""
    scale, settings = shape.size**-0.5, {"window": shape.window}
    found: dict[str, Callable[..., Tensor]] = {}
    if shape.softcap is None:
        found["varlen"] = lambda q, k, v, sinks: document_attention(
            q, k, v, bounds, ROW, scale=scale, sinks=sinks, **settings
        )
    if shape.softcap is None and not packed and shape.window is None:

        def rows(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            parts = [x.unflatten(0, (ROWS, ROW)).transpose(1, 2) for x in (q, k, v)]
            return row_attention(*parts, scale=scale, sinks=sinks).transpose(1, 2).flatten(0, 1)

        def slices(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            q, k, v = (x.unflatten(0, (ROWS, ROW)).transpose(1, 2) for x in (q, k, v))
            found = [
                row_attention(
                    *(q[:, :, end - SLICE : end], k[:, :, :end], v[:, :, :end]),
                    scale=scale,
                    sinks=sinks,
                )
                for end in range(SLICE, ROW + 1, SLICE)
            ]
            return torch.cat(found, 2).transpose(1, 2).flatten(0, 1)

        found |= {"rows": rows, "rows in slices": slices}
    first, last = visible_keys(bounds, bounds, ROW * ROWS, shape.window or -1)
    mask = block_mask(first, last, ROW * ROWS)
    found["flex"] = lambda q, k, v, sinks: FLEX(
        q, k, v, mask, scale=scale, sinks=sinks, softcap=shape.softcap
    )
    if shape.softcap is None and not shape.sinks:
        plain = not packed and shape.window is None
        seen = None
        if not plain:
            places = torch.arange(ROW * ROWS, device="cuda")
            whole = (places <= places.unsqueeze(1)) & (places >= first.unsqueeze(1))
            seen = torch.stack([whole[i : i + ROW, i : i + ROW] for i in (0, ROW)]).unsqueeze(1)

        def sdpa(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            rows = [x.unflatten(0, (ROWS, ROW)).transpose(1, 2) for x in (q, k, v)]
            if not plain:
                rows[1:] = [
                    x.repeat_interleave(shape.heads // shape.key_heads, 1) for x in rows[1:]
                ]
            output = functional.scaled_dot_product_attention(
                *rows, attn_mask=seen, is_causal=plain, scale=scale, enable_gqa=plain
            )
            return output.transpose(1, 2).flatten(0, 1)

        found["sdpa" if plain else "sdpa, mask"] = sdpa
    return found


def random_inputs(shape: Shape) -> tuple[Tensor, ...]:
    sizes = [(shape.heads, shape.size), (shape.key_heads, shape.size)]
    sizes += [(shape.key_heads, shape.value_size)]
    made = [torch.randn(ROW * ROWS, *size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    return tuple(x.requires_grad_() for x in made)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def compare(shape: Shape, packed: bool) -> dict[str, float]:
    """Return the largest relative error of each way's output and gradients, of one key head."""
    group = shape.heads // shape.key_heads
    bounds, states = bounds_of(packed), random_inputs(shape)
    sinks = torch.randn(shape.heads, device="cuda").requires_grad_() if shape.sinks else None
    leaves = (*states, *([] if sinks is None else [sinks]))
    given = torch.randn(ROW * ROWS, shape.heads, shape.value_size, device="cuda").bfloat16()
    few = [x[:, :heads] for x, heads in zip(states, (group, 1, 1), strict=True)]
    few += [] if sinks is None else [sinks[:group]]
    few = [x.detach().float().requires_grad_() for x in few]
    settings = {"scale": shape.size**-0.5, "window": shape.window, "softcap": shape.softcap}
    expected = document_attention_reference(
        *few[:3], bounds, sinks=few[3] if sinks is not None else None, **settings
    )
    gradients = torch.autograd.grad(expected, few, given[:, :group].float())
    errors = {}
    for name, way in ways(shape, bounds, packed).items():
        output = way(*states, sinks)
        mine = [output, *torch.autograd.grad(output, leaves, given)]
        found = [x[:, :heads] for x, heads in zip(mine, (group, group, 1, 1), strict=False)]
        found += [x[:group] for x in mine[4:]]
        pairs = zip(found, (expected, *gradients), strict=True)
        errors[name] = max(error(a, b) for a, b in pairs)
    return errors


def milliseconds(run: Callable[[], Any]) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # so that the host is ahead
        start.record()
        run()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in times)


def measure(shape: Shape, packed: bool) -> dict[str, dict[str, float]]:
    """Return forward and backward time of each way."""
    bounds, states = bounds_of(packed), random_inputs(shape)
    sinks = torch.randn(shape.heads, device="cuda").requires_grad_() if shape.sinks else None
    leaves = (*states, *([] if sinks is None else [sinks]))
    times = {}
    for name, way in ways(shape, bounds, packed).items():
        output = way(*states, sinks)
        given = torch.randn_like(output)

        def back(output: Tensor = output, given: Tensor = given) -> None:
            torch.autograd.grad(output, leaves, given, retain_graph=True)

        def forward(way: Callable[..., Tensor] = way) -> None:
            way(*states, sinks)

        times[name] = {
            "forward": round(milliseconds(forward), 3),
            "backward": round(milliseconds(back), 3),
        }
    return times


def main() -> None:
    """Print a line for each shape, packed and not."""
    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False  # backward passes are repeated
    for name, shape in SHAPES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        for packed in (False, True):
            errors = compare(shape, packed)
            line = {"shape": name, "packed": packed, **measure(shape, packed)}
            line["errors"] = {way: round(value, 5) for way, value in errors.items()}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
