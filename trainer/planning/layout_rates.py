"""Expected rates of layouts, for choosing between them.

The operations of the slowest stage at one rate, and what travels at two others; copies to host
memory go on beside the computation.
"""

from headrace.trainer.planning.planned_run import RunPlan

PRODUCTS = 500e12  # operations a second of one GPU while it trains: what an H200 was measured at
LINK = 100e9  # bytes a second between GPUs
HOST = 25e9  # bytes a second between a GPU and its host's memory
ITEMSIZE = 2  # of hidden states, in bfloat16


def tokens_per_second(run: RunPlan) -> float:
    """Return the tokens a second of one GPU."""
    config, stages = run.config, run.config.pipeline_stages
    tokens = config.places * run.sequence_len  # of a micro-batch
    slowest = max(stage.work for stage in run.stages) * tokens
    computed = slowest / config.sequence_parallel / PRODUCTS
    beside = max(copied_bytes(run, tokens) / HOST, gathered_bytes(run) / LINK)
    micro_batch = max(computed, beside) + exchanged_bytes(run, tokens) / LINK
    slots = config.gradient_accumulation_steps / (1 - run.bubble)
    step = slots * micro_batch + step_seconds(run)
    ranks = stages * config.sequence_parallel * config.tensor_parallel
    return tokens * config.gradient_accumulation_steps / step / ranks


def exchanged_bytes(run: RunPlan, tokens: int) -> float:
    """Bytes that a rank sends for a micro-batch: rows' heads, and hidden states to other stages and
    to the ranks that share its weights.
    """
    config, settings = run.config, run.plan.architecture.config
    shares = config.sequence_parallel
    sent = (
        2
        * run.plan.architecture.stream.width
        * ITEMSIZE
        * tokens
        / shares
        * (config.pipeline_stages > 1)
    )
    heads = settings.num_attention_heads
    size = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    keys = max(getattr(settings, "num_key_value_heads", None) or heads, shares)
    passes = 3 if config.activation_checkpointing == "full" else 2
    layers = max(sum(len(span) for span in stage.layers) for stage in run.stages)
    exchanged = 2 * (heads + keys) * size * ITEMSIZE * tokens / shares * (1 - 1 / shares)
    parts = config.tensor_parallel  # who sum hidden states after attention and MLP
    summed = 4 * settings.hidden_size * ITEMSIZE * tokens / shares * (1 - 1 / parts)
    return sent + (exchanged / parts + summed) * passes * layers


def copied_bytes(run: RunPlan, tokens: int) -> float:
    """Bytes between a GPU and host memory for a micro-batch."""
    config = run.config
    layers = max(sum(len(span) for span in stage.layers) for stage in run.stages)
    copied = brought_bytes(run, config.weight_offload)
    if config.activation_offload:
        copied += 2 * run.activations.boundary / config.sequence_parallel * layers
    return copied


def gathered_bytes(run: RunPlan) -> float:
    """Bytes of frozen weights that come from other GPUs for a micro-batch."""
    copies = run.replicas * run.config.sequence_parallel
    return brought_bytes(run, run.config.weight_shard) * (1 - 1 / copies)


def brought_bytes(run: RunPlan, wish: str) -> float:
    """Bytes of frozen weights that are brought for a micro-batch, of each layer in each pass.

    Args:
        wish: which weights.
    """
    config, size = run.config, run.plan.size
    if wish == "none":
        return 0.0
    layers = max(sum(len(span) for span in stage.layers) for stage in run.stages)
    part = size.layers[len(size.layers) // 2].offloadable[wish]
    passes = 2 if config.activation_checkpointing == "none" else 3
    return (part.weights * ITEMSIZE + part.quantized_bytes) * layers * passes


def step_seconds(run: RunPlan) -> float:
    """Seconds of a step after its last micro-batch: gradients to all copies, states to and fro."""
    config = run.config
    copies = run.replicas * config.sequence_parallel
    fullest = max(run.stages, key=lambda stage: stage.memory.gradients)
    seconds = 2 * fullest.memory.gradients * (1 - 1 / copies) / LINK
    if config.optimizer.offload:
        numbers = config.optimizer.record.state_numbers(
            fullest.trained, fullest.trained, config.optimizer.used_momentum
        )
        itemsize = fullest.memory.gradients / max(1, fullest.trained)
        seconds += 2 * numbers * itemsize / HOST
    return seconds
