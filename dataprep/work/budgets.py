"""Budgets of a piece of work: what it holds at once. No byte of the result depends on them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budgets:
    """Limits of the sorted files between tasks and shards, in tokens or in files.

    Attributes:
        held_tokens: are sorted and written at once: 32 MiB of ids, copied twice for that.
        gathered_tokens: are mapped in and sorted at once: 16 MiB, copied by row groups.
        slices_at_once: are mapped in: Linux maps 64 KiB around each page that is read.
        most_files: that a shard gathers from: pieces of 16 KiB or more, one after another.
        merged_tokens: in one merged file: about 1 GiB of ids.
        portion_tokens: of a finished shard are read by one task, with a marker of its own.
    """

    held_tokens: int = 1 << 23
    gathered_tokens: int = 1 << 22
    slices_at_once: int = 256
    most_files: int = 512
    merged_tokens: int = 1 << 28
    portion_tokens: int = 1 << 26
