"""Whereabouts of rows: one split of several shard directories, and how it is read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headrace.schemas.shards.manifest import Manifest
from headrace.schemas.train.data_config import LoaderConfig


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """One split of several shard directories, as a reader is given it.

    Attributes:
        held_row_groups: decoded row groups kept in memory, least recently used dropped first.
        apart: that many for each dataset. A shared limit would drop those of a dataset that is
            seldom read whenever another one moves on.
        may_replace: let other rows stand in for damaged ones, where the loader's config has it so.
    """

    directories: Sequence[Path | str]
    manifests: Sequence[Manifest]
    split: str
    held_row_groups: int
    apart: bool = False
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    may_replace: bool = True

    @property
    def replaces_damaged(self) -> bool:
        """Return whether damage is no error."""
        return self.may_replace and self.loader.on_corrupt == "quarantine"
