"""Estimate of a run's result, from a sample of its input: no output is written."""

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.dataprep.input.files import describe_file, find_inputs
from headrace.dataprep.input.pieces import Piece, Task
from headrace.dataprep.input.streams import compression, decompressed, open_random
from headrace.dataprep.planning import build_context, plan
from headrace.dataprep.rows.blocks import process_block, read_blocks
from headrace.dataprep.rows.evaluation_sets import open_sets
from headrace.dataprep.rows.task_stats import add_stats
from headrace.dataprep.shards.findings import Estimate, Findings
from headrace.dataprep.text.encoding import encode_texts
from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.dataprep.work.context import Context
from headrace.dataprep.work.local_engine import LocalEngine
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.shards.parquet_options import parquet_options

WORK_BYTES = 4.2  # a token on disk while the run lasts; twice that to find duplicates
SHUFFLE_SECONDS = 40e-9  # a token, one core


@dataclass(frozen=True)
class Sampling:
    """Amount that is read of each source: a share, at least so many bytes in so many samples.

    Many small samples tell more than few large ones.
    """

    share: float = 0.01
    least_bytes: int = 8 << 20
    least_samples: int = 32
    least_sample_bytes: int = 1 << 16


SAMPLING = Sampling()


@dataclass(frozen=True)
class Sample:
    """A task over a part of the input, and the input bytes that it stands for."""

    task: Task
    size: int


@dataclass(frozen=True)
class Measured:
    """Findings of one sample, the seconds of one core it took, and its rows' bytes as Parquet."""

    findings: Findings
    seconds: float
    stored: int


@dataclass(frozen=True)
class Survey:
    """An estimate, what was found in each source, and the tokenizer."""

    estimate: Estimate
    findings: dict[str, Findings]
    tokenizer: TokenizerSpec


def estimate(
    config: PrepareConfig, workers: int | None = None, sampling: Sampling = SAMPLING
) -> Estimate:
    """Return the estimate of a survey."""
    return survey(config, workers, sampling).estimate


def survey(
    config: PrepareConfig, workers: int | None = None, sampling: Sampling = SAMPLING
) -> Survey:
    """Sample each source, evenly over its input, and scale what was found.

    Raises:
        ConfigError, DataError: as `prepare` does, before any work.
    """
    context = build_context(config)
    tasks = plan(context, find_inputs(context.config.sources))
    with tempfile.TemporaryDirectory() as folder, closing(LocalEngine(workers)) as engine:
        parts, findings = [], {}
        for source in context.config.sources:
            own = [task for task in tasks if task.source.name == source.name]
            samples = choose_samples(own, context.config.block_bytes, Path(folder), sampling)
            measured = [result for _, result in engine.run(partial(measure, context), samples)]
            found = scale(own, samples, measured, context, engine.workers)
            parts.append(limit(found, source.max_rows, source.max_tokens))
            findings[source.name] = Findings.sum([part.findings for part in measured])
    total = limit(sum_estimates(parts), context.config.max_rows, context.config.max_tokens)
    return Survey(total, findings, context.tokenizer)


def limit(found: Estimate, rows: int | None, tokens: int | None) -> Estimate:
    """Apply limits of rows and tokens to an estimate; the input is tokenized in any case."""
    shares = [1.0, (rows or found.rows) / (found.rows or 1)]
    share = min(*shares, (tokens or found.tokens) / (found.tokens or 1))
    return replace(
        found,
        rows=share * found.rows,
        tokens=share * found.tokens,
        trained=share * found.trained,
        stored_bytes=share * found.stored_bytes,
    )


def choose_samples(tasks: list[Task], block: int, folder: Path, sampling: Sampling) -> list[Sample]:
    """Parts of blocks at equal distances over the input of one source; all of a small one."""
    total = sum(task.size for task in tasks)
    wanted = max(int(total * sampling.share), sampling.least_bytes)
    if wanted * 2 >= total:
        return [Sample(task, task.size) for task in tasks]
    ends = list(accumulate(task.size for task in tasks))
    size = min(block, max(wanted // sampling.least_samples, sampling.least_sample_bytes))
    count = -(-wanted // size)
    chosen: dict[tuple[Piece, ...], Sample] = {}
    for number in range(count):
        position = (2 * number + 1) * total // (2 * count)
        index = next(index for index, end in enumerate(ends) if end > position)
        offset = position - (ends[index] - tasks[index].size)
        sample = cut_sample(tasks[index], offset, size, folder)
        chosen.setdefault(sample.task.pieces, sample)
    return list(chosen.values())


def cut_sample(task: Task, offset: int, wanted: int, folder: Path) -> Sample:
    """About `wanted` bytes of a task, from the piece that holds byte `offset` of its input on."""
    ends = list(accumulate(piece.size for piece in task.pieces))
    first = next(index for index, end in enumerate(ends) if end > offset)
    piece = task.pieces[first]
    if piece.size > 2 * wanted and has_records(task, piece):
        if compression(piece.file.path):
            return sample_compressed(task, piece, wanted, folder)
        start = piece.start + min(offset - (ends[first] - piece.size), piece.size - wanted)
        part = Piece(piece.file, piece.format, start, start + wanted, wanted)
        return Sample(with_pieces(task, [part]), wanted)
    pieces: list[Piece] = []
    for piece in task.pieces[first:]:
        pieces.append(piece)
        if sum(piece.size for piece in pieces) >= wanted:
            break
    return Sample(with_pieces(task, pieces), sum(piece.size for piece in pieces))


def has_records(task: Task, piece: Piece) -> bool:
    """Return whether records begin anywhere in the piece, so that a part of it can be read."""
    path = piece.file.path
    if "://" in path and compression(path):
        return False
    separated = piece.format == "text" and task.source.separator is not None
    return piece.format == "jsonl" or separated


def sample_compressed(task: Task, piece: Piece, wanted: int, folder: Path) -> Sample:
    """The first bytes of a compressed file as a file of its own, and what it takes compressed."""
    path = piece.file.path
    separator = (task.source.separator or "\n").encode()
    with open_random(path) as raw:
        stream = decompressed(raw, compression(path) or "")
        data = bytes(stream.read(wanted))
        size = raw.tell()
    copy = folder / f"{task.number}{Path(path).stem}"
    copy.write_bytes(data[: data.rfind(separator) + len(separator)] or data)
    file = describe_file(task.source.name, str(copy))
    part = Piece(file, piece.format, 0, None, file.size)
    return Sample(with_pieces(task, [part]), size * file.size // len(data))


def with_pieces(task: Task, pieces: list[Piece]) -> Task:
    """The task over other input."""
    return Task(task.number, task.number_in_source, task.source, tuple(pieces))


def measure(context: Context, sample: Sample) -> Measured:
    """Tokenize and pack one sample in memory."""
    encode_texts(context.tokenizer, ["a"])  # opens the tokenizer
    started = time.perf_counter()
    row_format = context.row_format(sample.task.source)
    sets = open_sets(context.config.decontaminate)
    results = [
        process_block(context.config, context.tokenizer, row_format, sets, block)
        for block in read_blocks(context.config, row_format, sample.task)
    ]
    seconds = time.perf_counter() - started
    tables = [rows for result in results for rows in result.rows.values()]
    stored = stored_bytes(pa.concat_tables(tables), context.config) if tables else 0
    return Measured(Findings.of_blocks(results), seconds, stored)


def stored_bytes(rows: pa.Table, config: PrepareConfig) -> int:
    """Bytes of the columns of some rows in a shard."""
    target = pa.BufferOutputStream()
    options = parquet_options(config.kind, config.images is not None)
    with pq.ParquetWriter(target, rows.schema, **options) as writer:
        writer.write_table(rows.combine_chunks())
    group = pq.read_metadata(pa.BufferReader(target.getvalue())).row_group(0)
    return sum(group.column(index).total_compressed_size for index in range(group.num_columns))


def scale(
    tasks: list[Task],
    samples: list[Sample],
    measured: list[Measured],
    context: Context,
    workers: int,
) -> Estimate:
    """One source's estimate: what the samples gave, times the input for each sampled byte."""
    total = sum(task.size for task in tasks)
    sampled = sum(sample.size for sample in samples)
    factor = total / sampled if sampled else 1.0
    stats = add_stats(part.findings.stats for part in measured)
    kept = sum(stats.tokens.values())
    passes = 2 if context.config.deduplicate.enabled or context.config.mix_sources else 1
    seconds = sum(part.seconds for part in measured) + SHUFFLE_SECONDS * kept
    return Estimate(
        sampled_bytes=sampled,
        input_bytes=total,
        documents=factor * stats.documents,
        tokens=factor * kept,
        trained=factor * sum(stats.trained_tokens.values()),
        rows=factor * sum(stats.rows.values()),
        refused=factor * stats.rejected,
        seconds=factor * seconds / min(workers, len(tasks)),
        stored_bytes=factor * sum(part.stored for part in measured),
        work_bytes=factor * kept * WORK_BYTES * passes,
    )


def sum_estimates(parts: list[Estimate]) -> Estimate:
    """The estimate of all sources together."""
    return Estimate(
        **{
            name: sum(getattr(part, name) for part in parts)
            for name in Estimate.__dataclass_fields__
        }
    )
