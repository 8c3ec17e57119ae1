"""The kinds of rows that a shard directory holds, one kind each."""

from typing import Literal

# documents; pairs of a better and a worse answer; single answers, each with a label
ShardKind = Literal["causal", "preference", "unpaired"]
