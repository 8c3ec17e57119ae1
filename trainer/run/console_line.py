"""The console line of a training step."""

from headrace.trainer.metrics.metrics import StepMetrics


def console_line(metrics: StepMetrics, total_steps: int, seconds_left: float) -> str:
    """One readable line for one step."""
    plain = "" if metrics.cross_entropy == metrics.loss else f"  ce {metrics.cross_entropy:.4f}"
    if metrics.pairs is not None:
        plain += f"  accuracy {metrics.pairs.accuracy:4.0%}  margin {metrics.pairs.margin:.3f}"
    if metrics.labels is not None and metrics.labels.margin is not None:
        plain += f"  margin {metrics.labels.margin:.3f}"
    if metrics.answers is not None:
        answers = metrics.answers
        plain += f"  answers {answers.tokens:.0f} tok, {answers.ended:4.0%} ended"
        plain += f", {answers.seconds:.1f} s"
    router = "" if metrics.router_loss is None else f"  router {metrics.router_loss:.4f}"
    return (
        f"step {metrics.step:>{len(str(total_steps))}}/{total_steps}"
        f"  {metrics.step / total_steps:4.0%}"
        f"  epoch {metrics.epoch:.2f}"
        f"  loss {metrics.loss:.4f}{plain}"
        f"  fill {metrics.fill:4.0%}"
        f"{router}"
        f"  lr {metrics.lr:.2e}"
        f"  grad {metrics.gradient_norm:.3f}"
        f"  {metrics.tokens_per_second:,.0f} tok/s"
        f"  {metrics.seconds:.2f} s/step"
        f"  left {duration(seconds_left)}"
    )


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
