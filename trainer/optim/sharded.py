"""An optimizer whose states are shared out among the ranks that hold the same weights (ZeRO-1).

Each rank is given the sum of its share of every gradient, steps its share of the weight, in the
weight's own memory, and gives it to the others.
What is computed for an entry is what it would be without: only optimizers that step each entry by
itself can be shared. Source: https://arxiv.org/abs/1910.02054.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headrace.schemas.train.optimizers import OF_A_WEIGHT
from headrace.trainer.building.parameter_slots import TrainedParameter
from headrace.trainer.optim import states
from headrace.trainer.optim.optimizer import OptimizerAround, record_of
from headrace.trainer.optim.parameter_groups import Stepped
from headrace.trainer.optim.sums import gradient_of, used_by_any

ALIGNMENT = 64  # entries: shares begin where a whole weight's vectors of numbers do
BUCKET = 1 << 24  # entries of a share that travel at once, at least one weight's
Build = Callable[[Sequence[Stepped]], torch.optim.Optimizer]


# torch 2.13 has renamed it
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def share_of(entries: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return where a rank's share of so many entries begins, and how large a full share is."""
    size = -(-entries // ranks)
    size += -size % ALIGNMENT
    return min(rank * size, entries), size


@dataclass(frozen=True)
class Share:
    """This rank's share of one weight; shares of the last ranks may be short or empty."""

    item: TrainedParameter
    size: int  # of the first rank's share, in entries
    start: int
    parameter: nn.Parameter  # [entries], a view of the weight's memory

    @classmethod
    def of(cls, item: TrainedParameter, rank: int, ranks: int) -> "Share":
        """Cut a weight."""
        weight = item.parameter.detach()
        assert weight.is_contiguous(), item.name
        start, size = share_of(weight.numel(), rank, ranks)
        return cls(item, size, start, nn.Parameter(weight.view(-1)[start : start + size]))

    def cut(self, whole: Tensor) -> Tensor:
        """Return the share of a tensor like the weight."""
        return whole.reshape(-1)[self.start : self.start + self.size]


class ShardedOptimizer(OptimizerAround):
    """Steps this rank's shares; all ranks of the group call the same at the same time.

    Args:
        build: makes the optimizer of the shares, which stand in the place of their weights.
        group: of the ranks that hold the same weights, over the device's backend.
    """

    def __init__(self, trained: Sequence[TrainedParameter], build: Build, group: Any) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        rank = dist.get_rank(group)
        self.shares = {item.parameter: Share.of(item, rank, self.ranks) for item in trained}
        held = [share for share in self.shares.values() if share.parameter.numel()]
        self.inner = build([Stepped(share.item, share.parameter) for share in held])

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Return the groups of the shares."""
        return self.inner.param_groups

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the shares."""
        return [share.parameter for share in self.shares.values()]

    def gradient_of(self, parameter: nn.Parameter) -> Tensor | None:
        """Return this rank's share of a weight's gradient, once it is reduced."""
        return self.shares[parameter].parameter.grad

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Give each rank the sums of its shares of the gradients, and let go of the whole ones."""
        weights = list(self.shares)
        device = weights[0].device if weights else None
        used = used_by_any(weights, self.group, device) if device else []
        for bucket in buckets([self.shares[weight] for weight in used]):
            sizes = [share.size for share in bucket]
            rows = [self._rows(share) for share in bucket]
            mine = rows[0].new_empty(sum(sizes))
            reduce_scatter(mine, torch.cat(rows, dim=1).view(-1), group=self.group)
            for share, part in zip(bucket, mine.split(sizes), strict=True):
                share.parameter.grad = part[: share.parameter.numel()]
                share.item.parameter.grad = None

    def _rows(self, share: Share) -> Tensor:
        """Return [ranks, size] of a weight's gradient, filled up with zeros."""
        gradient = gradient_of(share.item.parameter).reshape(-1)
        missing = self.ranks * share.size - len(gradient)
        return nn.functional.pad(gradient, (0, missing)).view(self.ranks, share.size)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        stepped = [share for share in self.shares.values() if share.parameter.grad is not None]
        self.inner.step()
        self._give(stepped)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of weights and shares."""
        for weight, share in self.shares.items():
            weight.grad = share.parameter.grad = None

    def eval(self) -> None:
        """Go to the weights that are used, where other ones are trained."""
        self.inner.eval()  # type: ignore[attr-defined]
        self._give(list(self.shares.values()))

    def train(self) -> None:
        """Go back to the weights that are trained, at this rank's shares alone."""
        self.inner.train()  # type: ignore[attr-defined]

    @torch.no_grad()
    def tensors_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the whole states of a weight, as without shares."""
        share, record = self.shares[parameter], record_of(self.inner)
        assert record.states is not None
        held = states.tensors_of(self.inner, share.parameter) if share.parameter.numel() else {}
        names = states.state_names(record.states, parameter, self.inner.param_groups[0])
        whole = {}
        for name in [*names, *record.group_numbers]:
            if name in names and record.states[name].fresh in OF_A_WEIGHT:
                value = held.get(name, parameter.new_empty(0))
                (parts,) = self._gather([value.to(parameter.device)], [share.size])
                whole[name] = parts.reshape(-1)[: parameter.numel()].view(parameter.shape)
            else:
                dtype = torch.float32 if name in names else torch.float64
                number = torch.as_tensor(held.get(name, 0.0), dtype=torch.float64)
                (parts,) = self._gather([number.to(parameter.device).reshape(1)], [1])
                whole[name] = parts[0, 0].to(dtype)  # the first rank has a share of every weight
        return whole

    def restore(self, parameter: nn.Parameter, read: states.Read) -> None:
        """Give a weight its share of the states that `read` finds whole."""
        share = self.shares[parameter]
        if not share.parameter.numel():
            return

        def read_share(name: str, shape: torch.Size) -> Tensor:
            return share.cut(read(name, parameter.shape)) if shape else read(name, shape)

        states.restore(self.inner, share.parameter, read_share)

    def _give(self, shares: Sequence[Share]) -> None:
        """Let every rank have all ranks' shares of some weights."""
        for bucket in buckets(shares):
            values = [share.parameter.detach() for share in bucket]
            for share, parts in zip(
                bucket, self._gather(values, [share.size for share in bucket]), strict=True
            ):
                weight = share.item.parameter
                weight.detach().view(-1).copy_(parts.reshape(-1)[: weight.numel()])

    def _gather(self, values: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Return [ranks, size] of each value, of which a rank may hold fewer entries."""
        padded = [nn.functional.pad(v, (0, n - len(v))) for v, n in zip(values, sizes, strict=True)]
        mine = torch.cat(padded)
        everyone = mine.new_empty(self.ranks, len(mine))
        dist.all_gather(list(everyone.unbind(0)), mine, group=self.group)
        return list(everyone.split(list(sizes), dim=1))


def take_part(trained: Sequence[TrainedParameter], optimizer: torch.optim.Optimizer | None) -> None:
    """Give what this rank holds of the states to a rank that collects them."""
    if isinstance(optimizer, ShardedOptimizer):
        for item in trained:
            if item.owned:
                states.tensors_of(optimizer, item.parameter)


def buckets(shares: Sequence[Share]) -> Iterator[list[Share]]:
    """Yield shares of one type that travel together."""
    bucket: list[Share] = []
    for share in shares:
        other = bool(bucket) and bucket[0].parameter.dtype != share.parameter.dtype
        if other or sum(member.size for member in bucket) >= BUCKET:
            yield bucket
            bucket = []
        bucket.append(share)
    if bucket:
        yield bucket
