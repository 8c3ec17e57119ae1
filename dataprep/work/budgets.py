"""Budgets of a piece of work: what it holds at once. No byte of the result depends on them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budgets:
    """Limits of what is sorted, searched and counted at once, between tasks and shards.

    Attributes:
        held_tokens: are sorted and written at once: 32 MiB of ids, copied twice for that.
        gathered_tokens: are mapped in and sorted at once: 16 MiB, copied by row groups.
        slices_at_once: are mapped in: Linux maps 64 KiB around each page that is read.
        most_files: that a shard gathers from: pieces of 16 KiB or more, one after another.
        merged_tokens: in one merged file: about 1 GiB of ids.
        portion_tokens: of a finished shard are read by one task, with a marker of its own.
        long_row: tokens on average from which on copying row by row beats Arrow's `take`.
        keys_in_part: of documents are searched for duplicates at once: about 90 MB.
        rank_bits: of the rows' ranks are told apart in one pass.
        poll_seconds: between two looks at the notes of running tasks.
    """

    held_tokens: int = 1 << 23
    gathered_tokens: int = 1 << 22
    slices_at_once: int = 256
    most_files: int = 512
    merged_tokens: int = 1 << 28
    portion_tokens: int = 1 << 26
    long_row: int = 128
    keys_in_part: int = 1 << 22
    rank_bits: int = 10
    poll_seconds: float = 0.5
