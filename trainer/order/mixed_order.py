"""Several datasets mixed in exact proportion: a pure function of (shares, global row index)."""

from collections.abc import Sequence

from headrace.trainer.order.mixture import Schedule
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.shards.row_groups import RowAddress


class MixedOrder:
    """An endless sequence of rows: each dataset's own order, mixed by a schedule.

    Args:
        seen: rows of each own order that are left out at its start. Default: none.
    """

    def __init__(
        self, schedule: Schedule, orders: Sequence[RowOrder], seen: Sequence[int] | None = None
    ) -> None:
        self.schedule = schedule
        self.orders = orders
        self.seen = seen or [0] * len(orders)

    def __getitem__(self, index: int) -> RowAddress:
        """The row at a global index."""
        dataset, row = self.schedule.locate(index)
        return self.orders[dataset][self.seen[dataset] + row]
