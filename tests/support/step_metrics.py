"""The metrics of one step, every field with a value of its own."""

from headrace.trainer.metrics.metrics import (
    StepMetrics,
)

STEP = StepMetrics(
    step=7,
    epoch=0.25,
    loss=2.34567,
    cross_entropy=2.34567,
    pairs=None,
    answers=None,
    router_loss=None,
    source_losses={"books": 2.5, "code": 2.25},
    lr=1.5e-4,
    gradient_norm=0.75,
    tokens=2048,
    trained_tokens=1024,
    seconds=0.5,
    tokens_per_second=4096.0,
    trained_share=0.5,
    memory_gib=1.25,
    first_row=48,
    rows_sha256="ab",
    fill=0.875,
    source_tokens={"books": 48, "code": 2000},
    overlong_rows=2,
    overlong_tokens=30,
    data_seconds=0.125,
    tflops=0.5,
    mfu=0.25,
    product_norm_mean=1.5,
    product_norm_min=0.5,
    product_norm_max=2.5,
    products_scaled=1,
    product_norm_histogram=None,
)
