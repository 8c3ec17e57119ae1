"""A linear layer with a low-rank adapter, all in the type of its input."""

from torch import Tensor
from torch.nn import functional


def lora_linear(x: Tensor, base: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """`base + scale * (x @ A.T) @ B.T`, the adapter's part computed in the type of x.

    Differs from PEFT, which casts x to the adapter's float32, multiplies there and casts back: at
    16,384 tokens of an 8B Llama that reads and writes 2.4 times as much as the base layer itself.

    Args:
        x: [..., inputs]; base: [..., outputs], what the frozen layer gives for it.
        lora_a: [rank, inputs]; lora_b: [outputs, rank]; of any type.
    """
    low = functional.linear(x, lora_a.to(x.dtype))
    return base + functional.linear(low, (lora_b * scale).to(x.dtype))
