"""Kernels against the rates of the device itself: copying for those that move bytes, else time.

Linear cross-entropy, AdamW-Kahan, and what the compiler makes
of RMSNorm, SwiGLU and rotary embedding. Prints JSON lines; needs a GPU.
"""

import json
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from headrace.kernels.adamw_kahan import AdamWStep
from headrace.kernels.linear_cross_entropy import linear_cross_entropy

TOKENS, HIDDEN, INNER, VOCABULARY, HEADS, HEAD_SIZE = 8192, 4096, 14336, 128256, 32, 128


def milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median time on the device, warmed up."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times[3:])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def copy_rate() -> float:
    """Bytes read and written a millisecond by a large copy."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source))


def report(name: str, function: Callable[[], object], moved: int, rate: float) -> None:
    """One line: time, and the share of the copy rate."""
    time = milliseconds(function)
    line = {"kernel": name, "ms": round(time, 4), "copy_share": round(moved / time / rate, 3)}
    print(json.dumps(line), flush=True)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers writes it."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
    return weight * y.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cosine + torch.cat([-x[..., half:], x[..., :half]], -1) * sine


def compiled_rates(rate: float) -> None:
    """Forward and backward of what torch.compile writes kernels for, at 8 times the tokens."""
    tokens = 8 * TOKENS
    x, weight = random(tokens, HIDDEN).requires_grad_(), random(HIDDEN)
    gate, up = (random(tokens, INNER).requires_grad_() for _ in range(2))
    q = random(tokens, HEADS, HEAD_SIZE).requires_grad_()
    cosine, sine = random(tokens, 1, HEAD_SIZE), random(tokens, 1, HEAD_SIZE)
    cases: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...], int, int]] = [
        ("RMSNorm", rms_norm, (x, weight), 2, 3),
        ("SwiGLU", swiglu, (gate, up), 3, 5),
        ("rotary", rotary, (q, cosine, sine), 2, 2),
    ]
    for name, function, inputs, passes, backward_passes in cases:
        faster = torch.compile(function)
        size = inputs[0].nbytes
        with torch.no_grad():
            report(f"{name} forward", lambda f=faster, i=inputs: f(*i), passes * size, rate)
        output = faster(*inputs)
        gradient = torch.randn_like(output)
        wanted = [value for value in inputs if value.requires_grad]

        def backward(o: Tensor = output, g: Tensor = gradient, w: list[Tensor] = wanted) -> object:
            return torch.autograd.grad(o, w, g, retain_graph=True)

        report(f"{name} backward", backward, backward_passes * size, rate)


def optimizer_rate(rate: float) -> None:
    from headrace.kernels.adamw_kahan_pass import adamw_kahan_pass

    tensors = [random(INNER * 4, HIDDEN) for _ in range(5)]
    tensors[3].abs_()
    step = AdamWStep(1e-5, 0.9, 0.99, 1e-6, 0.01, 7)
    moved = 9 * tensors[0].nbytes
    report("AdamW-Kahan", lambda: adamw_kahan_pass(*tensors, step), moved, rate)


def cross_entropy() -> None:
    """Time and memory of head and loss, forward and backward, the head frozen."""
    hidden, weight = random(TOKENS, HIDDEN).requires_grad_(), random(VOCABULARY, HIDDEN) * 0.02
    labels = torch.randint(0, VOCABULARY, (TOKENS,), device="cuda")
    for triton in (True, False):

        def run(triton: bool = triton) -> None:
            loss, _ = linear_cross_entropy(hidden, weight, labels, 1 / TOKENS, triton=triton)
            loss.backward()
            hidden.grad = None

        run()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = (torch.cuda.max_memory_allocated() - before) / (1 << 20)
        name = "linear cross-entropy" if triton else "linear cross-entropy, twin"
        line = {"kernel": name, "ms": round(milliseconds(run), 2), "mib": round(peak)}
        print(json.dumps(line), flush=True)


def main() -> None:
    if not torch.cuda.is_available():
        print("no GPU, no rates")
        return
    rate = copy_rate()
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy_tb_s": round(rate / 1e9, 2)}))
    cross_entropy()
    optimizer_rate(rate)
    compiled_rates(rate)


if __name__ == "__main__":
    main()
