"""A step's metrics are those of all ranks together."""

from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.objectives.row_loss import RowLoss
from headrace.trainer.optim.regularizers import ProductNorms
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.run.step_report import Report, step_facts, step_metrics
from headrace.trainer.shards.packed_rows import PackedRow

ROOM = 64
FACTS = step_facts(
    StepInputs(1, [], [], 30, 40, Position(), OverlongCount()),
    step=1, first_row=0, epoch=0.5, lr=1e-3, gradient_norm=1.0, seconds=2.0, flops_per_token=1e6,
)  # fmt: skip


def report(norms=None, losses=(), rows=None, **changes):
    """What a rank tells."""
    values = {
        "losses": list(losses),
        "rows": rows,
        "router_loss": None,
        "memory_gib": 1.0,
        "stop": False,
        "save": False,
        "written": None,
        "quarantined": [],
        "data_seconds": 0.0,
        "norms": norms,
        "tokens": None,
        "answers": None,
    }
    return Report(**values | changes)


def test_adapters_of_all_stages_are_in_the_norms():
    first = report(ProductNorms([1.0, 3.0], scaled=1), rows=[[[PackedRow("a", 1, 40)]]])
    last = report(ProductNorms([8.0], scaled=1), [RowLoss("a", 60.0, 30)])
    metrics = step_metrics([first, last], FACTS, ROOM)
    assert (metrics.product_norm_mean, metrics.product_norm_max) == (4.0, 8.0)
    assert metrics.product_norm_min == 1.0
    assert metrics.products_scaled == 2
    counts = metrics.product_norm_histogram.counts
    assert (counts[0], counts[-1], sum(counts)) == (1, 1, 3)


def test_tokens_of_every_replica_weigh_the_same():
    """Two replicas, one of which has few trained tokens with high losses."""
    long = report(losses=[RowLoss("a", 30.0, 30)], rows=[[[PackedRow("a", 1, 30)]]])
    short = report(losses=[RowLoss("a", 20.0, 2)], rows=[[[PackedRow("a", 2, 10)]]])
    metrics = step_metrics([long, short], FACTS, ROOM)
    assert metrics.loss == 50.0 / 32
    assert metrics.source_losses == {"a": 50.0 / 32}


def test_the_slowest_and_the_fullest_process_count():
    rows = [[[PackedRow("a", 1, 40)]]]
    one = report(rows=rows, losses=[RowLoss("a", 1.0, 1)], memory_gib=3.0, data_seconds=0.1)
    metrics = step_metrics([one, report(memory_gib=2.0, data_seconds=0.4)], FACTS, ROOM)
    assert (metrics.memory_gib, metrics.data_seconds) == (3.0, 0.4)
    assert metrics.tokens_per_second == 20.0
