"""Experts of one layer: right on the device, and how long forward and backward pass take.

First every kind of weights against float64 at a small size, then Qwen3-30B-A3B's and gpt-oss-20b's
shapes: ours with bfloat16, NF4 and FP8 weights, with and without LoRA, beside transformers' grouped
products with PEFT. `--profile` lists the kernels that take longest, `--compile` compiles ours.
Needs a GPU; takes about a minute.
"""

import argparse
import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.layers.expert_adapters import swap_expert_adapters
from headrace.trainer.layers.experts import WEIGHTS, GroupedExperts
from headrace.trainer.quantized.selection import Quantization

TOKENS, RANK = 8192, 16
SHAPES: dict[str, tuple[Any, str, dict[str, int]]] = {
    "Qwen3-30B-A3B": (
        Qwen3MoeExperts,
        "qwen3_moe",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128},
    ),
    "gpt-oss-20b": (
        GptOssExperts,
        "gpt_oss",
        {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32},
    ),
}
SMALL = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "intermediate_size": 128,
    "num_experts": 6,
    "num_local_experts": 6,
}
CHOSEN = {"qwen3_moe": 8, "gpt_oss": 4}
KINDS: dict[str, dict[str, object] | None] = {
    "bf16": None,
    "nf4": {"backend": "bnb"},
    "fp8": {"backend": "fp8"},
    "nf4, products in fp8": {"backend": "bnb", "matmul": "fp8"},
    "hqq": {"backend": "hqq", "bits": 4},
    "int8": {"backend": "bnb", "type": "int8"},
}
TIMED = ("bf16", "nf4", "fp8", "nf4, products in fp8")
TOLERANCES = {"bf16": 0.01, "nf4": 0.01, "hqq": 0.01, "int8": 0.01}  # else 0.08: of e4m3


def make_experts(experts: Any, model_type: str, sizes: dict[str, int]) -> nn.Module:
    """Experts as transformers makes them, frozen, with random weights, in bfloat16."""
    config = CONFIG_MAPPING[model_type](**sizes)
    config._experts_implementation = "grouped_mm"
    with torch.device("cuda"):
        made: nn.Module = experts(config).to(torch.bfloat16).requires_grad_(False)
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in made.parameters():
        parameter.normal_(std=0.02 if parameter.ndim == 3 else 0.1, generator=generator)
    return made


def build(
    theirs: nn.Module, kind: str, with_lora: bool
) -> tuple[Any, GroupedExperts, list[Tensor]]:
    """Return experts over the same weights, those without adapters, and the adapters' parameters.

    Args:
        kind: "transformers", or what ours hold the weights in.
    """
    base: Any = theirs
    if kind != "transformers":
        base = GroupedExperts(theirs)
        base._parameters = dict(base._parameters)
    model = adapted(base) if with_lora else nn.ModuleDict({"experts": base})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    swap_expert_adapters(model)
    settings = KINDS.get(kind)
    quantization = Quantization(QuantizationConfig.model_validate(settings)) if settings else None
    for name in WEIGHTS if quantization else ():
        value = base.as_held(getattr(theirs, name))
        base.set_quantized(name, quantization.make(value, name, torch.bfloat16), torch.bfloat16)
    return model.get_submodule("experts"), base, trained


def adapted(experts: nn.Module) -> nn.Module:
    """Experts in a module that PEFT has put LoRA on."""
    holder = nn.ModuleDict({"experts": experts})
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in WEIGHTS],
    )
    model: nn.Module = inject_adapter_in_model(config, holder)
    generator = torch.Generator("cuda").manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.empty_like(parameter, dtype=torch.float32, device="cuda")
            parameter.data.normal_(std=0.02, generator=generator)
            parameter.requires_grad_(True)
    return model


def inputs(tokens: int, hidden: int, experts: int, chosen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts and their weights; the last expert is sent nothing."""
    generator = torch.Generator("cuda").manual_seed(2)
    states = torch.randn(tokens, hidden, device="cuda", generator=generator)
    scores = torch.rand(tokens, experts - 1, device="cuda", generator=generator)
    weights, index = scores.softmax(-1).topk(chosen, dim=-1)
    weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)
    return states.to(torch.bfloat16).requires_grad_(), index, weights.requires_grad_()


def step(experts: Callable[..., Tensor], given: tuple[Tensor, ...], trained: list[Tensor]) -> Any:
    """Return the output, and the gradients of states, weights and adapters."""
    states, index, weights = given
    output = experts(states, index, weights)
    return output, *torch.autograd.grad(output, [states, weights, *trained], states.detach())


def exact_step(experts: GroupedExperts, given: tuple[Tensor, ...], lora: Any) -> list[Tensor]:
    """Return the same in float64, expert by expert, adapters' gradients left out."""
    states, index, weights = (t.detach().double() if t.is_floating_point() else t for t in given)
    states.requires_grad_(), weights.requires_grad_()
    matrices = {}
    for name in WEIGHTS:
        held = experts.quantized(name)
        whole = experts.as_held(getattr(experts, name)) if held is None else None
        matrices[name] = (held.dequantize(torch.float32) if held else whole).double()
        if lora is not None:
            factor = lora[name]
            matrices[name] = matrices[name] + factor.scale * (factor.up @ factor.down).double()
    total = torch.zeros_like(states)
    for expert in range(experts.num_experts):
        tokens, place = torch.where(index == expert)
        both = states[tokens] @ matrices["gate_up_proj"][expert].T
        if hasattr(experts, "gate_up_proj_bias"):
            both = both + experts.gate_up_proj_bias[expert].double()
        result = experts._apply_gate(experts, both) @ matrices["down_proj"][expert].T
        if hasattr(experts, "down_proj_bias"):
            result = result + experts.down_proj_bias[expert].double()
        total = total.index_add(0, tokens, result * weights[tokens, place, None])
    gradients = torch.autograd.grad(total, [states, weights], given[0].detach().double())
    return [total, *gradients]


def factors(module: Any) -> dict[str, Any]:
    """The adapters of nested `AdaptedExperts` by the weights' names."""
    found = {}
    while hasattr(module, "parameter_name"):
        found[module.parameter_name] = module._factors()
        module = module.base_layer
    return found


def check() -> bool:
    """Compare every kind, with and without adapters, with float64."""
    right = True
    for experts, model_type, _ in SHAPES.values():
        sizes = SMALL | {"num_experts_per_tok": 2}
        theirs = make_experts(experts, model_type, sizes)
        given = inputs(300, SMALL["hidden_size"], SMALL["num_experts"], 2)
        for kind in KINDS:
            for with_lora in (False, True):
                module, base, trained = build(copy.deepcopy(theirs), kind, with_lora)
                lora = factors(module) if with_lora else None
                found = step(module, given, trained)
                again = step(module, given, trained)
                same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
                exact = exact_step(base, given, lora)
                errors = [
                    float((a.detach().double() - b.detach()).norm() / b.detach().norm())
                    for a, b in zip(found, exact, strict=False)
                ]
                fits = max(errors) <= TOLERANCES.get(kind, 0.08) and same
                right &= fits
                shown = ", ".join(f"{error:.1e}" for error in errors)
                name = f"{model_type} {kind}{' + LoRA' if with_lora else ''}"
                print(f"{name:40} {shown}{'' if same else ' CHANGES'}{'' if fits else ' WRONG'}")
    return right


def milliseconds(function: Callable[[], object], repeats: int = 7) -> tuple[float, float]:
    """Median time on the device, warmed up, and the peak of memory above what was there, GiB."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times), (torch.cuda.max_memory_allocated() - before) / 2**30


def time_shape(name: str, options: argparse.Namespace) -> None:
    """Print the times of one shape."""
    experts, model_type, sizes = SHAPES[name]
    theirs = make_experts(experts, model_type, sizes)
    chosen, count = CHOSEN[model_type], theirs.gate_up_proj.shape[0]
    given = inputs(TOKENS, sizes["hidden_size"], count, chosen)
    inner = theirs.down_proj.numel() // count // sizes["hidden_size"]
    work = 2 * 2 * 3 * TOKENS * chosen * sizes["hidden_size"] * inner  # both directions

    def show(kind: str, module: Any, trained: list[Tensor]) -> None:
        time, memory = milliseconds(lambda: step(module, given, trained))
        rate = work / time / 1e9
        print(f"{name:14} {kind:34} {time:8.2f} ms {rate:6.0f} TFLOP/s {memory:6.2f} GiB")
        if kind in options.profile:
            profile(lambda: step(module, given, trained))

    for with_lora in (False, True):
        suffix = " + LoRA" if with_lora else ""
        for kind in ("transformers", *TIMED):
            module, base, trained = build(theirs, kind, with_lora)
            show(kind + suffix, module, trained)
            if options.compile and kind == "bf16":
                show(kind + suffix + ", compiled", torch.compile(module, dynamic=False), trained)
            del base, module, trained


def profile(function: Callable[[], object], lines: int = 9) -> None:
    """Print the kernels that take longest."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as result:
        function()
        torch.cuda.synchronize()
    events = sorted(result.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events[:lines]:
        time = event.self_device_time_total / 1000
        print(f"    {time:8.3f} ms {event.count:4} {event.key[:100]}")


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", nargs="+", default=[], help='kinds, such as "bf16 + LoRA"')
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    right = check()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    for name in SHAPES:
        time_shape(name, options)
    if not right:
        raise SystemExit("not right: see above")


if __name__ == "__main__":
    main()
