"""What becomes of documents that are longer than a row, where documents are kept whole."""

from typing import NamedTuple

from headrace.dataprep.tokenizer import Ids
from headrace.schemas.prepare_config import Overlong

TRUNCATED = "overlong document truncated"
DROPPED = "overlong document dropped"


class Fitted(NamedTuple):
    """Documents that fit into rows, and by reason the tokens and whole documents left out."""

    documents: list[Ids]
    tokens_dropped: dict[str, int]
    documents_dropped: dict[str, int]


def fit_documents(documents: list[Ids], sequence_len: int, overlong: Overlong | None) -> Fitted:
    """Split, truncate or drop what is longer than `sequence_len`; None leaves all as it is."""
    excess = [len(ids) - sequence_len for ids in documents if len(ids) > sequence_len]
    if overlong is None or not excess:
        return Fitted(documents, {}, {})
    if overlong == "truncate":
        cut = [ids[:sequence_len] for ids in documents]
        return Fitted(cut, {TRUNCATED: sum(excess)}, {})
    if overlong == "drop":
        short = [ids for ids in documents if len(ids) <= sequence_len]
        tokens = sum(excess) + len(excess) * sequence_len
        return Fitted(short, {DROPPED: tokens}, {DROPPED: len(excess)})
    return Fitted([piece for ids in documents for piece in split(ids, sequence_len)], {}, {})


def split(ids: Ids, sequence_len: int) -> list[Ids]:
    """Pieces of `sequence_len` tokens; the last is shorter."""
    return [ids[start : start + sequence_len] for start in range(0, len(ids), sequence_len)]
