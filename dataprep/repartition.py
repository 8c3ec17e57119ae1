"""Finished shard directories to one: another number of shards, another order, a blend."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from headrace.dataprep.console_report import print_ledger, progress_bar
from headrace.dataprep.exchange import write_shards
from headrace.dataprep.local_engine import Engine
from headrace.dataprep.portions import (
    Portion,
    PortionStats,
    Rekeying,
    SourceCounts,
    finished_portion,
    plan_portions,
    run_portion,
)
from headrace.dataprep.runs import Runs
from headrace.dataprep.shard_writer import Target
from headrace.dataprep.tokenizer import TOKENIZER_NAME
from headrace.dataprep.workspace import (
    CONFIG_NAME,
    REJECTS_NAME,
    Workspace,
    locked,
    open_output,
    remove_work,
)
from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.manifest import (
    Manifest,
    ShardRecord,
    SourceRecord,
    TokenLedger,
    read_manifest,
    write_manifest,
)
from headrace.schemas.publish import rename_durably, write_atomic
from headrace.schemas.shard_format import EVALUATION, MANIFEST_NAME, SPLITS, TRAIN

ROW_GROUP_TOKENS = 1 << 20  # where a directory does not say
TOKENS_IN_EVALUATION_FILE = 1 << 26
LEFT_OUT = "left out by weight"
REPARTITION_VERSION = 1  # raise it when the same call would give other rows


@dataclass(frozen=True)
class Blend:
    """What to do. Without `seed` the order is a new one; without `weights` all rows are taken."""

    directories: tuple[Path, ...]
    output: Path
    shards: int
    seed: int | None = None
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Inputs:
    """The directories, read and found to fit together; `settings` is their `prepare.json`."""

    directories: tuple[Path, ...]
    manifests: tuple[Manifest, ...]
    settings: tuple[dict[str, object], ...]

    @property
    def first(self) -> Manifest:
        """The manifest whose tokenizer, length and kind all share."""
        return self.manifests[0]


def repartition(blend: Blend, engine: Engine, console: Console) -> Manifest:
    """Write the shard directory; the same call over the same directories gives the same bytes.

    Train rows are reshuffled over `shards` files, evaluation rows over as many as their size
    needs. With the seed that a single directory has, rows keep their keys and so their order, and
    the result is what `prepare` writes with that number of shards.

    Raises:
        DataError: a directory is unfinished or damaged, they do not fit together, or the output
            holds something else.
    """
    inputs = read_inputs(blend)
    seed = inputs.first.seed + 1 if blend.seed is None else blend.seed
    settings = new_settings(blend, inputs, seed)
    inputs_key = inputs_fingerprint(inputs, keeps_order(inputs, seed))
    finished = finished_manifest(blend.output, fingerprint(settings), inputs_key)
    if finished is not None:
        remove_work(blend.output)
        console.print(f"{blend.output}: finished before from the same directories; reused")
        print_ledger(console, finished)
        return finished
    check_outside(blend)
    space = Workspace(blend.output)
    open_output(blend.output)
    with locked(blend.output):
        space.open()
        try:
            manifest = run(space, blend, inputs, seed, settings, inputs_key, engine, console)
        except KeyboardInterrupt:
            console.print(f"{blend.output}: stopped; run the same command to continue")
            raise
        remove_work(blend.output)
    print_ledger(console, manifest)
    return manifest


def run(
    space: Workspace,
    blend: Blend,
    inputs: Inputs,
    seed: int,
    settings: dict[str, object],
    inputs_key: str,
    engine: Engine,
    console: Console,
) -> Manifest:
    """Everything from the planned portions to the published manifest."""
    text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    write_atomic(blend.output / CONFIG_NAME, text)
    tokenizer = inputs.directories[0] / TOKENIZER_NAME
    write_atomic(blend.output / TOKENIZER_NAME, tokenizer.read_bytes())
    join_rejects(inputs, blend.output)
    rows_in_group = max(1, row_group_tokens(inputs) // inputs.first.sequence_len)
    target = Target(space, inputs.first.kind, rows_in_group)
    rekeying = Rekeying(source_names(inputs), None if keeps_order(inputs, seed) else seed)
    portions = plan_portions(inputs.directories, inputs.manifests, blend.weights)
    stats = run_portions(target, rekeying, portions, engine, console)
    splits: list[tuple[Runs, int]] = []
    for split, count in count_shards(blend, stats).items():
        own = [portion.work_key(rekeying) for portion in portions if portion.split == split]
        splits.append((Runs(split, len(own), stats.tokens(split), fingerprint(own)), count))
    shards = write_shards(target, splits, engine, console)
    manifest = build_manifest(inputs, seed, settings, inputs_key, stats, shards)
    write_manifest(blend.output, manifest)
    return manifest


def run_portions(
    target: Target,
    rekeying: Rekeying,
    portions: list[Portion],
    engine: Engine,
    console: Console,
) -> PortionStats:
    """The counts of all portions together; those that are finished are not read again."""
    total = PortionStats()
    todo: list[Portion] = []
    for portion in portions:
        if (stats := finished_portion(target, rekeying, portion)) is None:
            todo.append(portion)
        else:
            total.add(stats)
    with progress_bar(console) as progress:
        size = sum(4 * portion.tokens for portion in todo)
        bar = progress.add_task("read    ", total=size, counts="")
        for portion, stats in engine.run(partial(run_portion, target, rekeying), todo):
            total.add(stats)
            tokens = sum(total.tokens(split) for split in SPLITS)
            progress.update(bar, advance=4 * portion.tokens, counts=f"{tokens:,} tokens")
    return total


def read_inputs(blend: Blend) -> Inputs:
    """Read the directories' manifests and settings, and see that they fit together."""
    if len({path.resolve() for path in blend.directories}) < len(blend.directories):
        raise ConfigError("a directory is named twice; name each once, and give it a weight")
    manifests = tuple(read_manifest(directory) for directory in blend.directories)
    for directory, manifest in zip(blend.directories, manifests, strict=True):
        if manifest.columns is not None:
            raise DataError(
                f"{directory}: only indexed, so its rows have no order by key that could be "
                'cut and blended; prepare it as a source with type = "pretokenized"'
            )
    for directory, manifest in zip(blend.directories[1:], manifests[1:], strict=True):
        first, other = describe(manifests[0]), describe(manifest)
        for name, value in first.items():
            if other[name] != value:
                raise DataError(
                    f"{directory}: {name} {other[name]}, but {blend.directories[0]} has {value}; "
                    "prepare both alike"
                )
    for directory, manifest in zip(blend.directories, manifests, strict=True):
        if not manifest.split(TRAIN) or not sum(s.rows for s in manifest.split(TRAIN)):
            raise DataError(f"{directory}: no train rows; leave it out")
    return Inputs(blend.directories, manifests, tuple(map(read_settings, blend.directories)))


def describe(manifest: Manifest) -> dict[str, object]:
    """What directories must share to be blended."""
    return {
        "kind": manifest.kind,
        "sequence_len": manifest.sequence_len,
        "tokenizer": manifest.tokenizer.fingerprint[:12],
        "special tokens": manifest.tokenizer.special_tokens,
    }


def read_settings(directory: Path) -> dict[str, object]:
    """The `prepare.json` of a directory; empty where something else wrote the shards."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); prepare the directory again") from None
    return settings if isinstance(settings, dict) else {}


def own_config(settings: dict[str, object]) -> dict[str, object]:
    """The config of `prepare` in its settings; empty in those of other commands."""
    config = settings.get("config")
    return config if isinstance(config, dict) else {}


def row_group_tokens(inputs: Inputs) -> int:
    """Tokens in a row group, as the first directory was prepared."""
    tokens = own_config(inputs.settings[0]).get("row_group_tokens", ROW_GROUP_TOKENS)
    assert isinstance(tokens, int)
    return tokens


def keeps_order(inputs: Inputs, seed: int) -> bool:
    """Whether the rows lie in the order of this seed already."""
    return len(inputs.manifests) == 1 and seed == inputs.first.seed


def new_settings(blend: Blend, inputs: Inputs, seed: int) -> dict[str, object]:
    """The new `prepare.json`: that of `prepare` itself where only the number of shards changes."""
    (first, *_) = inputs.settings
    if keeps_order(inputs, seed) and own_config(first):
        return first | {"config": own_config(first) | {"shards": blend.shards}}
    return {
        "version": REPARTITION_VERSION,
        "repartition": {"shards": blend.shards, "seed": seed, "weights": blend.weights},
        "directories": list(inputs.settings),
    }


def inputs_fingerprint(inputs: Inputs, same_order: bool) -> str:
    """SHA-256 over the directories' contents; that of the documents where rows stay as they are."""
    if same_order:
        return inputs.first.inputs_fingerprint
    return fingerprint([manifest.model_dump(mode="json") for manifest in inputs.manifests])


def finished_manifest(output: Path, config_key: str, inputs_key: str) -> Manifest | None:
    """The manifest of an output that is finished already, or None."""
    if not (output / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(output)
    if (manifest.config_fingerprint, manifest.inputs_fingerprint) != (config_key, inputs_key):
        raise DataError(
            f"{output}: finished with other settings or from other directories; "
            "set another --out, or remove the directory"
        )
    return manifest


def check_outside(blend: Blend) -> None:
    """The output is not one of the inputs, nor in one, nor around one."""
    output = blend.output.resolve()
    for directory in blend.directories:
        path = directory.resolve()
        if path == output or path in output.parents or output in path.parents:
            raise ConfigError(f"--out {blend.output}: overlaps {directory}; set another")


def join_rejects(inputs: Inputs, output: Path) -> None:
    """What the directories refused, in one file."""
    path = output / REJECTS_NAME
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    with unfinished.open("wb") as target:
        for directory in inputs.directories:
            if (directory / REJECTS_NAME).is_file():
                with (directory / REJECTS_NAME).open("rb") as source:
                    shutil.copyfileobj(source, target)
    rename_durably(unfinished, path)


def source_names(inputs: Inputs) -> tuple[str, ...]:
    """The names of all sources, each once, in the order of the directories."""
    names = (source.name for manifest in inputs.manifests for source in manifest.sources)
    return tuple(dict.fromkeys(names))


def count_shards(blend: Blend, stats: PortionStats) -> dict[str, int]:
    """The files of each split."""
    evaluation = -(-stats.tokens(EVALUATION) // TOKENS_IN_EVALUATION_FILE)
    return {TRAIN: blend.shards, EVALUATION: evaluation}


def build_manifest(
    inputs: Inputs,
    seed: int,
    settings: dict[str, object],
    inputs_key: str,
    stats: PortionStats,
    shards: list[ShardRecord],
) -> Manifest:
    """The manifest: what was read, refused and dropped before is carried on."""
    tokens_out = dict.fromkeys(SPLITS, 0)
    for shard in shards:
        tokens_out[shard.split] += shard.tokens
    packings = sorted({manifest.packing for manifest in inputs.manifests})
    manifest = Manifest(
        kind=inputs.first.kind,
        tokenizer=inputs.first.tokenizer,
        sequence_len=inputs.first.sequence_len,
        packing="+".join(packings),
        seed=seed,
        config_fingerprint=fingerprint(settings),
        inputs_fingerprint=inputs_key,
        shards=shards,
        sources=[
            merge_records(
                [s for manifest in inputs.manifests for s in manifest.sources if s.name == name],
                stats.sources.get(name, SourceCounts()),
            )
            for name in source_names(inputs)
        ],
        ledger=merge_ledgers([manifest.ledger for manifest in inputs.manifests], tokens_out, stats),
    )
    difference = manifest.ledger.difference()
    assert difference == 0, f"token ledger is off by {difference}"
    return manifest


def merge_records(records: Sequence[SourceRecord], counts: SourceCounts) -> SourceRecord:
    """One source: documents as they were read, rows and tokens as they are here.

    Document lengths of a source that several directories have cannot be told from theirs.
    """
    dropped: dict[str, int] = {}
    for record in records:
        for reason, documents in record.dropped_documents.items():
            dropped[reason] = dropped.get(reason, 0) + documents
    quantiles = records[0].document_length_quantiles if len(records) == 1 else {}
    return records[0].model_copy(
        update={
            "documents": sum(record.documents for record in records),
            "rejected_documents": sum(record.rejected_documents for record in records),
            "dropped_documents": dict(sorted(dropped.items())),
            "rows": counts.rows,
            "tokens": counts.tokens,
            "trained_tokens": counts.trained_tokens,
            "document_length_quantiles": quantiles,
        }
    )


def merge_ledgers(
    ledgers: Sequence[TokenLedger], tokens_out: dict[str, int], stats: PortionStats
) -> TokenLedger:
    """All tokens that the directories were made from; those not taken over are counted."""
    dropped: dict[str, int] = {}
    for ledger in ledgers:
        for reason, tokens in ledger.tokens_dropped.items():
            dropped[reason] = dropped.get(reason, 0) + tokens
    held = sum(sum(ledger.tokens_out.values()) for ledger in ledgers)
    left_out = held - sum(counts.tokens for counts in stats.sources.values())
    if left_out:
        dropped[LEFT_OUT] = dropped.get(LEFT_OUT, 0) + left_out
    return TokenLedger(
        tokens_in=sum(ledger.tokens_in for ledger in ledgers),
        tokens_out=tokens_out,
        tokens_dropped=dict(sorted(dropped.items())),
    )


def parse_weights(text: str, directories: int) -> tuple[float, ...]:
    """`3,1` as numbers, one for each directory."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--weights {text}: not numbers; write for example 3,1") from None
    if len(weights) != directories:
        raise ConfigError(f"--weights {text}: {len(weights)} for {directories} directories")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"--weights {text}: each must be above 0; leave out what is not wanted")
    return weights
