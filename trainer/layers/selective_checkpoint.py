"""Recomputation of a layer that keeps what is dear to compute and small to hold.

Kept are the results of attention and of matrix products, but for every second product that is wide,
such as `up` beside `gate`, which take most of a layer's memory. Norms, activations, adapters'
second factors and the rest are computed again from these, and so are the products of experts,
which have several rows for each token.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from headrace.kernels import frozen_linear  # noqa: F401 (it registers operators)
from headrace.kernels.fp8 import linear as fp8_linear  # noqa: F401 (the same)
from headrace.trainer.layers.layer_functions import (
    LayerFunctions,
    run_layer,
    run_layer_checkpointed,
)

WIDE = 2  # outputs over inputs from which only every second product is kept
LOW_RANK = 8  # outputs over inputs from which it is an adapter's second factor, quick to repeat
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}
DOCUMENTS = "headrace::document_attention"  # forward pass


class Choice:
    """The choice of what one pass over a layer keeps."""

    def __init__(self) -> None:
        self.wide = 0  # products so far

    def keeps(self, operator: Any, inputs: Sequence[Any]) -> bool:
        """Say whether the result of the next operator is kept."""
        if operator in ATTENTION or operator.name() == DOCUMENTS:
            return True
        sizes = product_sizes(operator, inputs)
        if sizes is None or sizes[0] >= LOW_RANK * sizes[1]:
            return False
        self.wide += sizes[0] >= WIDE * sizes[1]
        return sizes[0] < WIDE * sizes[1] or self.wide % 2 == 1


def kept_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of one layer's forward pass and of its recomputation."""
    choices = {False: Choice(), True: Choice()}

    def policy(
        context: SelectiveCheckpointContext, operator: Any, *inputs: Any, **_: Any
    ) -> CheckpointPolicy:
        kept = choices[context.is_recompute].keeps(operator, inputs)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] = (
        create_selective_checkpoint_contexts(policy)
    )
    return contexts


def run_layer_selectively(layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Run one decoder layer that keeps some results."""
    run = partial(run_layer, layer, arguments=arguments)
    output: Tensor = checkpoint(
        run, hidden, use_reentrant=False, preserve_rng_state=False, context_fn=kept_products
    )
    return output


def layer_functions(*, selective: bool) -> LayerFunctions:
    """The plain ways to run a layer: once, and again for the backward pass."""
    again = run_layer_selectively if selective else run_layer_checkpointed
    return LayerFunctions(run_layer, again)


class KeptBytes(TorchDispatchMode):
    """Counts the bytes of what a layer keeps, as it runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.choice, self.bytes = Choice(), 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.choice.keeps(func, args):
            found = output if isinstance(output, tuple) else (output,)
            self.bytes += sum(part.nbytes for part in found if isinstance(part, Tensor))
        return output


def product_sizes(operator: Any, inputs: Sequence[Any]) -> tuple[int, int] | None:
    """Return outputs and inputs of a matrix product; None for other operators."""
    ops = torch.ops
    if operator == ops.headrace.fp8_product.default:
        return inputs[5][0], inputs[5][1]
    if operator == ops.headrace.frozen_linear.default:
        return inputs[4][0], inputs[4][1]
    if operator == ops.aten.mm.default:
        return inputs[1].shape[1], inputs[1].shape[0]
    if operator == ops.aten.addmm.default:
        return inputs[2].shape[1], inputs[2].shape[0]
    return None
