"""Recomputation of a layer that keeps what is dear to compute and small to hold.

Kept are the results of attention and of matrix products, but for every second product that is wide,
such as `up` beside `gate`, which take most of a layer's memory. Norms, activations, adapters'
second factors and the rest are computed again from these, and so are the products of experts,
which have several rows for each token.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
from headrace.trainer.layers.activation_offload import ActivationOffload, Offloaded
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
        if attends(operator):
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


def attends(operator: Any) -> bool:
    """Return whether an operator is the forward pass of an attention."""
    return operator in ATTENTION or operator.name() == DOCUMENTS


@dataclass(frozen=True)
class KeptResult:
    """Results of an attention; the largest may be in host memory."""

    tensors: list[Any]
    largest: int
    sent: Offloaded | None


class KeptAttention:
    """Recomputation of layers that keeps the results of attention, which then runs once.

    Of a long row attention is most of the work, and its result as small as a layer's input.

    Args:
        offload: holds the results in host memory, if given.
    """

    def __init__(self, offload: ActivationOffload | None) -> None:
        self.offload = offload

    def begin(self) -> None:
        """Start a micro-batch."""
        if self.offload is not None:
            self.offload.begin()

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return the contexts of one layer's forward pass and of its recomputation."""
        kept: deque[KeptResult] = deque()
        return KeepingMode(kept, self), GivingMode(kept, self)

    def keep(self, results: Sequence[Any]) -> KeptResult:
        """Hold what an attention has given."""
        tensors = [x.detach() if isinstance(x, Tensor) else x for x in results]
        sizes = [x.nbytes if isinstance(x, Tensor) else -1 for x in tensors]
        largest = sizes.index(max(sizes))
        if self.offload is None:
            return KeptResult(tensors, largest, None)
        sent, tensors[largest] = self.offload.send(tensors[largest]), None
        return KeptResult(tensors, largest, sent)

    def give(self, kept: KeptResult) -> list[Any]:
        """Return it again."""
        tensors = list(kept.tensors)
        if self.offload is not None and kept.sent is not None:
            tensors[kept.largest] = self.offload.take_back(kept.sent)
        return tensors


class AttentionMode(TorchDispatchMode):
    """A mode that knows what attention has given."""

    def __init__(self, kept: deque[KeptResult], attention: KeptAttention) -> None:
        super().__init__()
        self.kept, self.attention = kept, attention


class KeepingMode(AttentionMode):
    """Keeps what attention gives."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if attends(func):
            results = output if isinstance(output, tuple) else (output,)
            self.kept.append(self.attention.keep(results))
        return output


class GivingMode(AttentionMode):
    """Gives what was kept in place of running attention."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not attends(func):
            return func(*args, **(kwargs or {}))
        results = self.attention.give(self.kept.popleft())
        return tuple(results) if len(results) > 1 else results[0]


class KeptBytes(TorchDispatchMode):
    """Counts the bytes of what a layer keeps, as it runs once.

    Args:
        attention: keeps that alone.
        offloaded: the largest result of each is in host memory.
    """

    def __init__(self, *, attention: bool = False, offloaded: bool = False) -> None:
        super().__init__()
        self.choice, self.bytes = Choice(), 0
        self.attention, self.offloaded = attention, offloaded

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if attends(func) if self.attention else self.choice.keeps(func, args):
            found = output if isinstance(output, tuple) else (output,)
            sizes = [part.nbytes for part in found if isinstance(part, Tensor)]
            self.bytes += sum(sizes) - self.offloaded * max(sizes)
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
