"""One file of a shard directory: its bytes, and its Parquet footer against the manifest."""

import errno
import zlib
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.schemas.errors import DataError, StorageError
from headrace.schemas.shards.manifest import Manifest, ShardRecord
from headrace.schemas.shards.shard_checks import check_schema, check_size
from headrace.schemas.shards.shard_rows import columns_of
from headrace.trainer.shards.row_group_cache import RowGroupCache
from headrace.trainer.shards.storage import Storage

# errors of a file itself (None: found here or by Arrow); others, such as EACCES or EMFILE, may pass
DAMAGE = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}
UNREADABLE = (ValueError, LookupError, OverflowError, pa.ArrowException, OSError)
END = b"????PAR1"  # the length of the footer before it, and the magic number of Parquet
MOST_FOOTER_BYTES = 64 << 20


@dataclass(frozen=True)
class ShardFile:
    """One file of one dataset: where it lies, and what the manifest says of it."""

    storage: Storage
    manifest: Manifest
    record: ShardRecord

    @property
    def name(self) -> str:
        return self.storage.name(self.record.file)

    def fetch_footer(self, cache: RowGroupCache | None = None) -> bytes:
        """Return the bytes after the last row group, as `fetch` does."""
        offset = self.record.footer_offset
        size = self.record.bytes - offset
        return self.fetch(offset, size, self.record.footer_crc32, cache)

    def fetch(
        self, offset: int, size: int, crc32: int | None, cache: RowGroupCache | None = None
    ) -> bytes:
        """Return bytes of the file, whole and as they were written.

        Raises:
            OSError: they are others, or fewer, or the file cannot be read.
        """

        def read() -> bytes:
            content = self.storage.read(self.record.file, offset, size)
            if len(content) != size:
                raise OSError(f"the file ends {size - len(content)} bytes too early")
            if crc32 is not None and zlib.crc32(content) != crc32:
                raise OSError("its bytes are not those that were written")
            return content

        if cache is None or not self.storage.remote:
            return read()
        return cache.get(self.record.sha256, offset, size, read)


def check_footer(footer: pq.FileMetaData, file: ShardFile) -> None:
    """Check that a file is a shard of this format. What is not is no damage, and not replaced.

    Raises:
        DataError: it is not.
        ValueError: another number of row groups than its manifest names.
    """
    try:
        check_schema(footer.schema.to_arrow_schema(), file.manifest)
    except (ValueError, pa.ArrowException) as error:
        raise DataError(f"{file.name}: {error}; prepare the directory again") from None
    if footer.num_row_groups != len(file.record.row_groups):
        raise ValueError(
            f"{footer.num_row_groups} row groups, the manifest has {len(file.record.row_groups)}"
        )


def footer_damage(file: ShardFile) -> str | None:
    """Return how a file's footer differs from its manifest; None where it does not.

    Nothing is said of a file that is missing, which its size tells.

    Raises:
        DataError: the file is no shard of this format, by the footer that it has.
        StorageError: the storage does not answer.
    """
    try:
        footer = pq.read_metadata(pa.BufferReader(file.fetch_footer()))
        check_footer(footer, file)
        names = columns_of(file.manifest, footer.schema.to_arrow_schema().names)
        for index, group in enumerate(file.record.row_groups):
            check_size(footer.row_group(index), file.manifest, group, names)
    except FileNotFoundError:
        return None
    except OSError as error:
        problem = damage(file, error)
    except UNREADABLE as error:
        problem = " ".join(str(error).split())
    else:
        return None
    check_as_it_lies(file)
    return problem


def check_as_it_lies(file: ShardFile) -> None:
    """Refuse a file that is whole Parquet of another format, whatever its manifest says of it.

    Raises:
        DataError: it is such a file.
    """
    storage, name = file.storage, file.record.file
    (size,) = storage.sizes([name])
    if size is None or size < len(END):
        return
    end = storage.read(name, size - len(END), len(END))
    length = int.from_bytes(end[:4], "little") + len(END)
    if end[4:] != END[4:] or length > min(size, MOST_FOOTER_BYTES):
        return
    try:
        content = storage.read(name, size - length, length)
        check_footer(pq.read_metadata(pa.BufferReader(content)), file)
    except UNREADABLE:
        return


def damage(file: ShardFile, error: OSError) -> str:
    """Return what is wrong with a file's bytes.

    Raises:
        StorageError: the error is not of the file itself.
    """
    if error.errno not in DAMAGE:
        raise StorageError(f"{file.name}: {error}; correct that and continue") from None
    return " ".join(str(error).split())
