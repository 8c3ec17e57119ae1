"""Hidden states of two models that go through the stages together, as one tensor."""

import torch
from torch import Tensor


def joined(hidden: Tensor, other: Tensor, *, wide: bool) -> Tensor:
    """Return hidden states of a model and of the one that it is compared with, as they are sent.

    Args:
        hidden: [b, s, width].
        wide: the other's may be of another width, and lie behind each token's: [b, s, both widths].
            Otherwise its rows follow: [2b, s, width].
    """
    return torch.cat([hidden, other], dim=-1 if wide else 0)


def parted(inputs: Tensor, width: int, *, wide: bool) -> tuple[Tensor, Tensor]:
    """Return what `joined` has put together.

    Args:
        width: of the first model's hidden states.
    """
    if not wide:
        own, other = inputs.chunk(2)
        return own, other
    return inputs[..., :width].contiguous(), inputs[..., width:].contiguous()
