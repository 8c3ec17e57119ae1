"""AdamW with Kahan summation: the kernel equals its twin, and bfloat16 weights lose no update."""

from pathlib import Path

import pytest
import torch
from runs import checkpoint_tensors, exact_metrics

from headrace.kernels.adamw_kahan import AdamWStep, adamw_kahan_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("weight", "exp_avg", "exp_avg_sq", "compensation")


def at_step(step, lr=1e-3):
    return AdamWStep(lr=lr, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, step=step)


def start(dtype, size=1000):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(size, generator=generator).to(DEVICE, dtype)
    return [weight, *(torch.zeros_like(weight) for _ in range(3))]


def gradients(steps, dtype, size=1000):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, generator=generator).to(DEVICE, dtype) for _ in range(steps)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_the_kernel_equals_its_twin(monkeypatch, dtype):
    from headrace.kernels import adamw_kahan_triton as kernel

    monkeypatch.setattr(kernel, "BLOCK", 256)
    ours, twin, before = start(dtype), start(dtype), start(dtype)
    for number, gradient in enumerate(gradients(5, dtype), start=1):
        kernel.adamw_kahan_pass(ours[0], gradient, *ours[1:], at_step(number))
        adamw_kahan_reference(twin[0], gradient, *twin[1:], at_step(number))
    largest = 1e-5 if dtype == torch.float32 else 1e-2
    for name, value, expected in zip(NAMES[1:3], ours[1:3], twin[1:3], strict=True):
        assert distance(value, expected) <= largest * distance(expected), name
    # weight and compensation are one number in two parts
    whole, expected = ours[0].double() + ours[3].double(), twin[0].double() + twin[3].double()
    assert distance(whole, expected) <= largest * distance(expected, before[0])
    assert distance(ours[3]) > 0


def distance(a, b=0.0):
    return torch.linalg.vector_norm(a.double() - b)


def test_bfloat16_weights_follow_float64_where_plain_bfloat16_stands_still():
    steps, lr = 300, 1e-5
    weight, *states = start(torch.bfloat16)
    exact = weight.double().requires_grad_()
    plain = weight.clone().requires_grad_()
    settings = {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW([exact], **settings), torch.optim.AdamW([plain], **settings)]
    before = exact.detach().clone()
    pull = torch.ones_like(weight)  # always the same way, so that the updates add up
    for number in range(1, steps + 1):
        adamw_kahan_reference(weight, pull, *states, at_step(number, lr))
        exact.grad, plain.grad = pull.double(), pull.clone()
        for optimizer in optimizers:
            optimizer.step()
    exact, moved = exact.detach(), distance(exact.detach(), before)
    assert distance(weight.double() + states[2].double(), exact) < 0.02 * moved
    assert distance(plain.detach(), exact) > 0.5 * moved


@pytest.mark.slow
def test_training_resumed_on_another_layout_continues_to_the_bit(training):
    settings = {
        "optimizer__type": "adamw_kahan",
        "adapter__kind": "none",
        "dtype": "bfloat16",
        "max_steps": 6,
        "checkpoint__every_steps": 3,
        "evaluation__before_first_step": False,
    }
    run = training.run("run", 2, pipeline_stages=2, **settings)
    metrics, tensors = exact_metrics(run), checkpoint_tensors(run)
    assert any(tensors[name].any() for name in tensors if name.startswith("compensation/"))
    assert all(tensors[name].dtype == torch.bfloat16 for name in tensors if "step/" not in name)
    remove(run / "checkpoints" / "step-000006")
    training.run("run", 1, "--resume", pipeline_stages=1, **settings)
    assert exact_metrics(run) == metrics
    resumed = checkpoint_tensors(run)
    assert list(resumed) and all(torch.equal(resumed[name], tensors[name]) for name in tensors)


def remove(checkpoint: Path):
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
