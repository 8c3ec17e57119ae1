"""Kernels against the rates of the device itself: copying for those that move bytes, else time.

Linear cross-entropy, AdamW-Kahan; RMSNorm, SwiGLU and rotary embedding by the compiler, by us, and
by Liger where it is installed. `--sweep` tries shapes of our norm and rotary kernels. Prints JSON
lines; needs a GPU.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headrace.kernels.adamw_kahan import AdamWStep
from headrace.kernels.linear_cross_entropy import linear_cross_entropy
from headrace.kernels.rms_norm import rms_norm, rms_norm_reference
from headrace.kernels.rotary import rotary, rotary_reference
from headrace.kernels.token_statistics import TokenStatistics

TOKENS, HIDDEN, INNER, VOCABULARY, HEADS, HEAD_SIZE = 8192, 4096, 14336, 128256, 32, 128
KEY_HEADS, EPS = 8, 1e-5
QUEUEING_CYCLES = 2_000_000  # about a millisecond, in which the host queues what is timed


def milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median time on the device, warmed up; kernels are queued while the device is kept busy."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(QUEUEING_CYCLES)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times[3:])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def copy_time(moved: int) -> float:
    """Milliseconds of a copy that reads and writes so many bytes together."""
    source = torch.ones(moved // 8, device="cuda")
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source))


def report(name: str, function: Callable[[], object], moved: int) -> None:
    """One line: time, and the share of the rate of a copy of as many bytes just before it."""
    copied, time = copy_time(moved), milliseconds(function)
    line = {"kernel": name, "ms": round(time, 4), "copy_share": round(copied / time, 3)}
    print(json.dumps(line | {"copy_tb_s": round(moved / copied / 1e9, 2)}), flush=True)


@dataclass(frozen=True)
class Case:
    """A way to compute something, and the bytes that it must move forward and backward."""

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    forward_bytes: int
    backward_bytes: int

    def report(self) -> None:
        with torch.no_grad():
            report(f"{self.name} forward", self._run, self.forward_bytes)
        outputs = self._run()
        gradients = [torch.randn_like(output) for output in outputs]
        wanted = [value for value in self.inputs if value.requires_grad]

        def backward() -> object:
            return torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)

        report(f"{self.name} backward", backward, self.backward_bytes)

    def _run(self) -> tuple[Tensor, ...]:
        result = self.function(*self.inputs)
        return result if isinstance(result, tuple) else (result,)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def norm_cases(trained: bool = False) -> Iterator[Case]:
    x, weight = random(8 * TOKENS, HIDDEN).requires_grad_(), random(HIDDEN).requires_grad_(trained)
    compiled = torch.compile(rms_norm_reference)
    ways: dict[str, Callable[..., Tensor]] = {
        "compiled": lambda x, w: compiled(x, w, EPS),
        "ours": lambda x, w: rms_norm(x, w, EPS, triton=True),
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops import rms_norm as liger

        ways["Liger"] = lambda x, w: liger.LigerRMSNormFunction.apply(x, w, EPS)
    kind = "RMSNorm, weight trained" if trained else "RMSNorm"
    for way, function in ways.items():
        yield Case(f"{kind}, {way}", function, (x, weight), 2 * x.nbytes, 3 * x.nbytes)


def swiglu_cases() -> Iterator[Case]:
    inputs = tuple(random(8 * TOKENS, INNER).requires_grad_() for _ in range(2))
    ways: dict[str, Callable[..., Tensor]] = {"compiled": torch.compile(swiglu)}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops import swiglu as liger

        ways["Liger"] = liger.LigerSiLUMulFunction.apply
    for way, function in ways.items():
        size = inputs[0].nbytes
        yield Case(f"SwiGLU, {way}", function, inputs, 3 * size, 5 * size)


def rotary_cases() -> Iterator[Case]:
    """Eight rows; the tables of cosines and sines are left out of the bytes."""
    query, key = (random(8, TOKENS, heads, HEAD_SIZE) for heads in (HEADS, KEY_HEADS))
    both = random(8, TOKENS, HEAD_SIZE // 2).repeat(1, 1, 2)
    tables = (both.cos(), both.sin())
    inputs = (query.requires_grad_(), key.requires_grad_(), *tables)
    ways: dict[str, Callable[..., tuple[Tensor, ...]]] = {
        "compiled": torch.compile(rotary_reference),
        "ours": lambda *values: rotary(*values, triton=True),
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops import rope as liger

        def by_liger(q: Tensor, k: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, ...]:
            return liger.LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), c, s)

        ways["Liger"] = by_liger
    moved = 2 * (query.nbytes + key.nbytes)
    for way, function in ways.items():
        yield Case(f"rotary, {way}", function, inputs, moved, moved)


def elementwise_rates() -> None:
    """At 8 times the tokens."""
    for cases in (norm_cases(), norm_cases(trained=True), swiglu_cases(), rotary_cases()):
        for case in cases:
            case.report()


def sweep() -> None:
    """Our norm and rotary kernels in other shapes than their files set."""
    from headrace.kernels import rms_norm_triton, rotary_triton

    for tiles, numbers in product((1, 2, 4), (256, 512, 1024)):
        rms_norm_triton.TILES, rms_norm_triton.WARP_NUMBERS = tiles, numbers
        print(json.dumps({"tiles": tiles, "numbers a warp": numbers}))
        _ours(norm_cases()).report()
    for tiles in (8, 16, 32, 64):
        rms_norm_triton.TRAINED_TILES = tiles
        print(json.dumps({"trained tiles": tiles, "numbers a warp": rms_norm_triton.WARP_NUMBERS}))
        _ours(norm_cases(trained=True)).report()
    for warps in (1, 2, 4, 8):
        rotary_triton.WARPS = warps
        print(json.dumps({"rotary warps": warps}))
        _ours(rotary_cases()).report()


def _ours(cases: Iterator[Case]) -> Case:
    return next(case for case in cases if case.name.endswith(", ours"))


def optimizer_rate() -> None:
    from headrace.kernels.adamw_kahan_triton import adamw_kahan_pass

    tensors = [random(INNER * 4, HIDDEN) for _ in range(5)]
    tensors[3].abs_()
    step = AdamWStep(1e-5, 0.9, 0.99, 1e-6, 0.01, 7)
    moved = 9 * tensors[0].nbytes
    report("AdamW-Kahan", lambda: adamw_kahan_pass(*tensors, step), moved)


def cross_entropy() -> None:
    """Time and memory of head and loss, forward and backward, the head frozen."""
    hidden, weight = random(TOKENS, HIDDEN).requires_grad_(), random(VOCABULARY, HIDDEN) * 0.02
    labels = torch.randint(0, VOCABULARY, (TOKENS,), device="cuda")
    statistics = TokenStatistics.empty(TOKENS, hidden.device)
    ways: dict[str, dict[str, Any]] = {
        "linear cross-entropy": {"triton": True},
        "linear cross-entropy, with statistics": {"triton": True, "statistics": statistics},
        "linear cross-entropy, twin": {"triton": False},
    }
    for name, settings in ways.items():

        def run(settings: dict[str, Any] = settings) -> None:
            loss, _ = linear_cross_entropy(hidden, weight, labels, 1 / TOKENS, **settings)
            loss.backward()
            hidden.grad = None

        run()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = (torch.cuda.max_memory_allocated() - before) / (1 << 20)
        line = {"kernel": name, "ms": round(milliseconds(run), 2), "mib": round(peak)}
        print(json.dumps(line), flush=True)


def main() -> None:
    if not torch.cuda.is_available():
        print("no GPU, no rates")
        return
    print(json.dumps({"device": torch.cuda.get_device_name()}))
    if "--sweep" in sys.argv:
        sweep()
        return
    cross_entropy()
    optimizer_rate()
    elementwise_rates()


if __name__ == "__main__":
    main()
