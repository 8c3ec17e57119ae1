"""qlora-pipe's TensorBoard tags and ours."""

# theirs, below `train/` or `eval/NAME/` -> ours, below `train/` or `evaluation/NAME/`; what differs
QLORA_PIPE_TAGS: tuple[tuple[str, str, str], ...] = (
    ("loss", "loss", ""),
    ("log_loss_hist", "tokens/log_loss_histogram", ""),
    ("loss_quantile_*", "loss_quantile/Q", ""),
    ("hidden_norm_avg", "tokens/hidden_norm", ""),
    ("hidden_norm_hist", "tokens/hidden_norm_histogram", ""),
    ("entropy", "tokens/entropy", ""),
    ("entropy_quantile_*", "entropy_quantile/Q", ""),
    ("normalised_entropy", "tokens/normalized_entropy", ""),
    ("normalised_entropy_quantile_*", "entropy_quantile/Q", "divide by log(vocabulary)"),
    ("log_likelihood", "cross_entropy", "its negative"),
    ("likelihood", "tokens/likelihood", ""),
    ("perplexity", "tokens/perplexity", ""),
    ("mcfaddens_pseudo_r2", "tokens/pseudo_r2", ""),
    ("top1_accuracy", "tokens/top1_accuracy", ""),
    ("top5_accuracy", "tokens/top5_accuracy", ""),
    ("top20_accuracy", "tokens/top20_accuracy", ""),
    ("load_balancing_loss", "router_loss", "layer by layer; in training"),
    ("alternate_load_balancing_loss", "", "the other way to pool layers, which we do not"),
    ("lr", "lr", ""),
    ("weights_scaled", "products_scaled", ""),
    ("weight_norm_avg", "product_norm_mean", ""),
    ("weight_norm_max", "product_norm_max", ""),
    ("weight_norm_hist", "product_norm_histogram", ""),
    ("epoch", "epoch", ""),
    ("eval_time_sec", "seconds", "of each set"),
)


def tag_table() -> list[str]:
    """Lines of the page."""
    rows = [
        f"| `{theirs}` | {f'`{ours}`' if ours else ''} | {note} |"
        for theirs, ours, note in QLORA_PIPE_TAGS
    ]
    return [
        "## TensorBoard tags of qlora-pipe",
        "",
        "Below `train/` in both, and below `eval/NAME/` there, `evaluation/NAME/` here.",
        "",
        "| theirs | ours | |",
        "| --- | --- | --- |",
        *rows,
        "",
    ]
