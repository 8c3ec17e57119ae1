"""1F1B against interleaved 1F1B, on a GPU for each stage: `interleaved.py --stages 4`.

Prints JSON lines, each as soon as it is known: whether gradients equal one process's, tokens/s of
one GPU alone, then of each schedule. Layers and engines are the trainer's; rows are random. Without
GPUs everything is tiny, and only the gradients mean something.
"""

import argparse
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from built_stages import build_chunks, build_stage

from headrace.jobs.commands.launch import launch
from headrace.jobs.tools.bench_inputs import write_model
from headrace.schemas.train.parallel_dims import ParallelDims
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.extras import Extras
from headrace.trainer.batches.feed import pinned
from headrace.trainer.batches.step_inputs import StepInputs
from headrace.trainer.building.built_stage import BuiltStage
from headrace.trainer.messages import gather
from headrace.trainer.optim.optimizer import build_optimizer
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.parallel import RankLayout, connect, set_threads
from headrace.trainer.pipeline.engine import StageEngine
from headrace.trainer.pipeline.interleaved_engine import InterleavedEngine
from headrace.trainer.pipeline.transfers import LARGEST_CTAS, Transfers
from headrace.trainer.quiet import quiet_libraries
from headrace.trainer.shards.packed_rows import PackedRow
from headrace.trainer.stage.stage import MicroBatch

NAME = Path(__file__).stem
MEASURED, TINY = "measured", "tiny"  # models


@dataclass(frozen=True)
class Variant:
    """One way to run the same step."""

    chunks: int
    ctas: int | None = None
    half_layers: bool = False

    @property
    def name(self) -> str:
        kind = "1f1b" if self.chunks == 1 else f"interleaved, {self.chunks} chunks"
        ctas = "" if self.chunks == 1 else f", ctas {self.ctas or 'of NCCL'}"
        return kind + ctas + (", half layers" if self.half_layers else "")


def variants(chunks: int) -> list[Variant]:
    return [
        Variant(1),
        Variant(chunks, LARGEST_CTAS),
        Variant(1, half_layers=True),
        Variant(chunks, LARGEST_CTAS, half_layers=True),
        Variant(chunks),
        Variant(chunks, 2 * LARGEST_CTAS),
        Variant(chunks, 1),
    ]


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=2, help="of a stage, interleaved")
    parser.add_argument("--preset", default="llama-8b" if on_gpu else "tiny")
    parser.add_argument("--layers", type=int, default=None if on_gpu else 8)
    parser.add_argument("--sequence", type=int, default=4096 if on_gpu else 64)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--checkpointing", choices=["none", "full"], default="none")
    parser.add_argument("--windows", type=int, default=3, help="steps that are measured")
    parser.add_argument("--seconds", type=float, default=230, help="no variant is begun after that")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which all is ended")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def config_of(options: argparse.Namespace, folder: Path, **changes: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": str(folder),
            "weights": "random",
            "output_dir": "unused",
            "datasets": [{"path": "unused"}],
            "micro_batch_size": options.micro_batch_size,
            "activation_checkpointing": options.checkpointing,
            "adapter": {"kind": "lora", "rank": 16},
            "optimizer": {"type": "adamw", "lr": 1e-5},
        }
        | changes
    )


def vocabulary_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def random_inputs(
    micro_batches: int, rows: int, sequence: int, vocabulary: int, layout: RankLayout
) -> StepInputs:
    """Rows of one random document each, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shape = (micro_batches, rows, sequence + 1)
    ids = torch.randint(0, vocabulary, shape, generator=generator, dtype=torch.int32)
    tokens = micro_batches * rows * sequence
    return StepInputs(
        micro_batches=micro_batches,
        document_lengths=[[[sequence]] * rows] * micro_batches,
        row_lengths=[[sequence] * rows] * micro_batches,
        trained_tokens=tokens,
        tokens=tokens,
        position=Position(),
        overlong=OverlongCount(),
        extras=[Extras()] * micro_batches,
        input_ids=pinned(ids[..., :-1].contiguous()) if layout.is_first else None,
        labels=pinned(ids[..., 1:].contiguous()) if layout.is_last else None,
        rows=[[[PackedRow("random", 0, sequence)]] * rows] * micro_batches,
    )


def build(
    config: TrainConfig, layout: RankLayout, variant: Variant
) -> tuple[BuiltStage, StageEngine]:
    """What this rank holds, and the engine that runs it."""
    schedule = {"schedule": "1f1b"}
    if variant.chunks > 1:
        schedule = {"schedule": "interleaved", "stage_chunks": variant.chunks}
    changes = {"pipeline_stages": layout.stages, "half_layers": variant.half_layers} | schedule
    config = config.model_copy(update=changes)
    built = build_chunks(config, layout.stage, layout.device)
    if variant.chunks == 1:
        return built, StageEngine(built.chunks, config, layout)
    width = built.model_config.hidden_size
    transfers = Transfers(layout, ctas=variant.ctas)
    return built, InterleavedEngine(built.chunks, config, layout, width, transfers)


def micro_batches_of(inputs: StepInputs, device: torch.device) -> Iterator[MicroBatch]:
    """As an engine would give them to the only stage of one process."""
    assert inputs.labels is not None
    for index in range(inputs.micro_batches):
        yield MicroBatch(
            document_lengths=inputs.document_lengths[index],
            row_lengths=inputs.row_lengths[index],
            labels=inputs.labels[index].to(device).long(),
            loss_scale=1.0 / inputs.trained_tokens,
            router_scale=1.0,
            seed=1 + index,
        )


def alone(layout: RankLayout) -> RankLayout:
    """This rank as if there were no other: it gets ids and labels."""
    return RankLayout(layout.device, first_stage_group=layout.first_stage_group)


def step_alone(built: BuiltStage, inputs: StepInputs, device: torch.device) -> None:
    """Forward and backward passes of all micro-batches in this process."""
    assert inputs.input_ids is not None
    if built.stage.before_step is not None:
        built.stage.before_step()
    for ids, micro_batch in zip(inputs.input_ids, micro_batches_of(inputs, device), strict=True):
        built.stage(ids.to(device).long(), micro_batch).value.backward()


def disturb(built: BuiltStage) -> None:
    """Adapters begin as zero, which would hide half of their gradients."""
    for item in built.trained:
        seed = sum(item.name.encode())
        noise = torch.randn(item.parameter.shape, generator=torch.Generator().manual_seed(seed))
        item.parameter.data += 0.02 * noise.to(item.parameter)


def check_gradients(options: argparse.Namespace, layout: RankLayout) -> dict[str, object]:
    """Compare a step of a tiny model with one process's, with dropout."""
    adapter = {"kind": "lora", "rank": 4, "dropout": 0.1}
    config = config_of(options, options.folder / TINY, compile=False, adapter=adapter)
    vocabulary = vocabulary_of(options.folder / TINY)
    shape = (2 * layout.stages, options.micro_batch_size, 64, vocabulary)
    one = build_stage(config, 0, layout.device)
    disturb(one)
    one.stage.train()
    step_alone(one, random_inputs(*shape, alone(layout)), layout.device)
    expected = {item.name: item.parameter.grad for item in one.trained}
    differences: dict[str, float] = {}
    for variant in (Variant(1), Variant(options.chunks, LARGEST_CTAS)):
        built, engine = build(config, layout, variant)
        disturb(built)
        engine.forward_backward(random_inputs(*shape, layout), 1)
        largest = 0.0
        for item in built.trained:
            reference, gradient = expected[item.name], item.parameter.grad
            assert reference is not None and gradient is not None and reference.any()
            largest = max(
                largest, float((gradient - reference).abs().max() / reference.abs().max())
            )
        differences[variant.name] = max(gather(largest, layout.world_group))
    return {"largest relative difference of a gradient": differences}


def seconds_of(step: Callable[[], object], windows: int, layout: RankLayout) -> float:
    """Median time of a step that all ranks start together."""
    times = []
    for _ in range(windows):
        dist.barrier(layout.world_group)
        start = time.perf_counter()
        step()
        if layout.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(max(gather(time.perf_counter() - start, layout.world_group)))
    return median(times)


def measure_alone(
    options: argparse.Namespace, config: TrainConfig, vocabulary: int, layout: RankLayout
) -> float:
    """Tokens/s of one process, while the others do the same."""
    built = build_stage(config, 0, layout.device)
    built.stage.train()
    size, sequence = options.micro_batch_size, options.sequence
    inputs = random_inputs(4, size, sequence, vocabulary, alone(layout))
    optimizer = build_optimizer(config.optimizer, built.trained)

    def step() -> None:
        step_alone(built, inputs, layout.device)
        optimizer.step()
        optimizer.zero_grad()

    step()
    return inputs.tokens / seconds_of(step, options.windows, layout)


def measure(
    options: argparse.Namespace,
    config: TrainConfig,
    vocabulary: int,
    layout: RankLayout,
    variant: Variant,
    rate_alone: float,
) -> None:
    """Print a line for each number of micro-batches."""
    built, engine = build(config, layout, variant)
    optimizer = build_optimizer(config.optimizer, built.trained)

    def step(inputs: StepInputs) -> None:
        engine.forward_backward(inputs, 1)
        optimizer.step()
        optimizer.zero_grad()

    def inputs_of(micro_batches: int) -> StepInputs:
        size, sequence = options.micro_batch_size, options.sequence
        return random_inputs(micro_batches, size, sequence, vocabulary, layout)

    step(inputs_of(layout.stages))
    layers = gather([str(chunk) for chunk in built.layers], layout.world_group)
    for micro_batches in options.micro_batches:
        inputs = inputs_of(micro_batches)
        if layout.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(partial(step, inputs), options.windows, layout)
        peak = torch.cuda.max_memory_allocated() if layout.device.type == "cuda" else 0
        rate, bubble = inputs.tokens / seconds, layout.stages - 1
        line = {
            "schedule": variant.name,
            "stages": layout.stages,
            "micro_batches": micro_batches,
            "tokens_per_second": round(rate),
            "efficiency": round(rate / layout.stages / rate_alone, 4),
            "without_bubble": round(1 - bubble / (variant.chunks * micro_batches + bubble), 4),
            "peak_gib": [round(x / 2**30, 1) for x in gather(peak, layout.world_group)],
            "layers": layers,
        }
        show(line, layout)
    for chunk in engine.chunks:  # DeepSpeed may hold on to an engine
        chunk.to("meta")


def show(line: dict[str, object], layout: RankLayout) -> None:
    if layout.rank == 0:
        print(json.dumps(line), flush=True)


def free_memory() -> None:
    """Engines hold themselves in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_rank(options: argparse.Namespace) -> None:
    """One of the measured processes."""
    started = time.perf_counter()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(options.limit))
    quiet_libraries()
    layout = connect(ParallelDims(stages=options.stages))
    config = config_of(options, options.folder / MEASURED)
    set_threads(config.threads)
    show(check_gradients(options, layout), layout)
    free_memory()
    vocabulary = vocabulary_of(options.folder / MEASURED)
    rate = measure_alone(options, config, vocabulary, layout)
    show({"schedule": "one process", "tokens_per_second": round(rate)}, layout)
    for variant in variants(options.chunks):
        free_memory()
        spent = max(gather(time.perf_counter() - started, layout.world_group))
        if spent > options.seconds:
            show({"schedule": variant.name, "left out after": round(spent)}, layout)
            continue
        measure(options, config, vocabulary, layout, variant, rate)
    dist.barrier(layout.world_group)
    dist.destroy_process_group()


def main() -> int:
    options = parse_arguments()
    if options.folder is not None:
        run_rank(options)
        return 0
    with TemporaryDirectory() as folder:
        write_model(Path(folder) / MEASURED, options.preset, options.layers)
        write_model(Path(folder) / TINY, "tiny", 2 * options.stages * options.chunks)
        here = str(Path(__file__).parent)
        os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
        return launch(NAME, [*sys.argv[1:], "--folder", folder], options.stages)


if __name__ == "__main__":
    sys.exit(main())
