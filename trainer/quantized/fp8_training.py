"""Linear layers of full fine-tuning that are multiplied in 8-bit floats."""

import torch
from torch import Tensor, nn

from headrace.kernels.fp8.linear import ALIGNMENT, fp8_trained_linear


class Fp8TrainedLinear(nn.Linear):
    """A trained linear layer, over the same parameters; see `kernels.fp8.linear`.

    Attributes:
        compute_dtype: type of inputs, and of the weight's gradient.
    """

    compute_dtype: torch.dtype

    def __init__(self, layer: nn.Linear, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._parameters |= layer._parameters
        self.compute_dtype = compute_dtype

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's)
        states = input.to(self.compute_dtype)
        return fp8_trained_linear(states, self.weight, self.bias)


def multiply_trained_in_fp8(layer: nn.Module, compute_dtype: torch.dtype) -> int:
    """Put such layers in the place of a decoder layer's trained ones; return how many there are.

    Layers of another class, or of sizes that the matrix units cannot multiply, stay as they are.
    """
    count = 0
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.requires_grad and fits(child):
                setattr(parent, name, Fp8TrainedLinear(child, compute_dtype))
                count += 1
    return count


def fits(layer: nn.Linear) -> bool:
    """Return whether matrix units multiply with a weight of this shape."""
    return layer.in_features % ALIGNMENT == 0 and layer.out_features % ALIGNMENT == 0
