"""Shard files against their manifests, once, before a run takes time to build its model."""

import hashlib
import itertools
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from headrace.schemas.errors import DataError
from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.shards.shard_format import EVALUATION, TRAIN
from headrace.schemas.train.data_config import DataConfig
from headrace.trainer.order.datasets import Inputs
from headrace.trainer.shards.shard_file import ShardFile, footer_damage
from headrace.trainer.shards.storage import open_storage, patience_of

logger = logging.getLogger(__name__)

PIECE_BYTES = 8 << 20
READ_AT_ONCE = 4  # files; hashing and reading both let other threads run
REPORT_SECONDS = 10


def verify_shards(config: DataConfig, inputs: Inputs) -> None:
    """Compare the files of all splits that are read with what their manifests say.

    Raises:
        DataError: a file is missing, or of another size, footer or, with "full", other content;
            where damage is put into quarantine this only warns. Or it is no shard of this format,
            which no other rows replace.
    """
    if config.loader.verify == "off":
        return
    shards: list[ShardFile] = []
    for path, manifest, split in datasets_of(config, inputs):
        storage = open_storage(path, patience_of(config.loader))
        shards += [ShardFile(storage, manifest, s) for s in manifest.split(split) if s.rows]
    checks = [wrong_sizes(shards), wrong_footers(shards)]
    if config.loader.verify == "full":
        checks.append(wrong_hashes(shards))
    for problem in itertools.chain.from_iterable(checks):
        if config.loader.on_corrupt == "stop":
            raise DataError(problem)
        logger.warning("%s", problem)
    logger.info("verified %d shard files (%s)", len(shards), config.loader.verify)


def datasets_of(config: DataConfig, inputs: Inputs) -> Iterator[tuple[str, Manifest, str]]:
    """Path, manifest and split of each dataset."""
    for dataset, manifest in zip(config.datasets, inputs.train, strict=True):
        yield dataset.path, manifest, TRAIN
    for evaluated, manifest in zip(config.evaluation_datasets, inputs.evaluation, strict=True):
        yield evaluated.path, manifest, EVALUATION


def wrong_sizes(shards: list[ShardFile]) -> Iterator[str]:
    """Files that are missing, or longer or shorter than they were written."""
    for storage, files in itertools.groupby(shards, key=lambda shard: shard.storage):
        records = [shard.record for shard in files]
        sizes = storage.sizes([record.file for record in records])
        for record, size in zip(records, sizes, strict=True):
            name = storage.name(record.file)
            if size is None:
                yield f"{name}: missing; restore it, or prepare the directory again"
            elif size != record.bytes:
                yield f"{name}: {size} bytes, {record.bytes} were written; restore the file"


def wrong_footers(shards: list[ShardFile]) -> Iterator[str]:
    """Files whose Parquet footers are not what their manifests declare."""
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        for shard, problem in zip(shards, pool.map(footer_damage, shards), strict=True):
            if problem is not None:
                yield f"{shard.name}: its footer is damaged ({problem}); restore the file"


def wrong_hashes(shards: list[ShardFile]) -> Iterator[str]:
    """Files with other bytes than were written. Says from time to time how far it is."""
    total, done, reported = sum(file.record.bytes for file in shards), 0, time.monotonic()
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        for shard, digest in zip(shards, pool.map(hash_shard, shards), strict=True):
            if digest not in {shard.record.sha256, None}:
                yield f"{shard.name}: damaged (its SHA-256 differs); restore the file"
            done += shard.record.bytes
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                logger.info("verifying: %.0f%% of %s bytes", 100 * done / total, f"{total:,}")


def hash_shard(shard: ShardFile) -> str | None:
    """SHA-256 of a file, read piece by piece; None where there is none, which its size tells."""
    record = shard.record
    digest = hashlib.sha256()
    try:
        for offset in range(0, record.bytes, PIECE_BYTES):
            size = min(PIECE_BYTES, record.bytes - offset)
            digest.update(shard.storage.read(record.file, offset, size))
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be read ({error})"
    return digest.hexdigest()
