"""The manifest of a blend: what its directories counted is carried on."""

from collections.abc import Sequence

from headrace.dataprep.rows.task_stats import add_counts
from headrace.dataprep.shards.blend_inputs import Inputs, source_names
from headrace.dataprep.shards.row_slices import RowSliceStats, SourceCounts
from headrace.schemas.fingerprint import fingerprint
from headrace.schemas.shards.manifest import (
    ImagesRecord,
    Manifest,
    PictureLedger,
    ShardRecord,
    SourceRecord,
    TokenLedger,
)
from headrace.schemas.shards.shard_format import SPLITS

LEFT_OUT = "left out by weight"


def build_manifest(
    inputs: Inputs,
    seed: int,
    settings: dict[str, object],
    inputs_key: str,
    stats: RowSliceStats,
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
        images=merge_images(inputs, stats),
    )
    difference = manifest.ledger.difference()
    assert difference == 0, f"token ledger is off by {difference}"
    return manifest


def merge_images(inputs: Inputs, stats: RowSliceStats) -> ImagesRecord | None:
    """Return what the directories share about pictures, with their ledgers added up."""
    records = [manifest.images for manifest in inputs.manifests if manifest.images is not None]
    if not records:
        return None
    ledgers = [record.ledger for record in records]
    out = {split: stats.pictures.get(split, 0) for split in SPLITS}
    held = sum(sum(ledger.pictures_out.values()) for ledger in ledgers)
    left = held - sum(out.values())
    dropped = [ledger.pictures_dropped for ledger in ledgers]
    ledger = PictureLedger(
        pictures_in=sum(ledger.pictures_in for ledger in ledgers),
        pictures_out=out,
        pictures_dropped=add_counts([*dropped, {LEFT_OUT: left} if left else {}]),
    )
    assert ledger.difference() == 0, f"picture ledger is off by {ledger.difference()}"
    return records[0].model_copy(update={"ledger": ledger})


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
            "mixed_tokens": add_counts(record.mixed_tokens for record in records),
        }
    )


def merge_ledgers(
    ledgers: Sequence[TokenLedger], tokens_out: dict[str, int], stats: RowSliceStats
) -> TokenLedger:
    """Add up the ledgers of the directories; tokens of rows not taken over count as dropped."""
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
