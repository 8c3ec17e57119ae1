"""A small Parquet file that unpacks to a very large one is refused before it is decoded."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.schemas import unpacked_sizes
from headrace.schemas.errors import DataError

COLUMNS = {
    "text": pa.array(["z" * 3_000_000]),
    "input_ids": pa.array([np.zeros(700_000, np.int32)]),
}


@pytest.mark.parametrize(("name", "kind"), [("text", "documents"), ("input_ids", "pretokenized")])
@pytest.mark.parametrize("dictionary", [True, False])
def test_a_bomb_is_refused_with_its_sizes(
    name, kind, dictionary, corpus, make_config, run, monkeypatch
):
    monkeypatch.setattr(unpacked_sizes, "LARGE", 1 << 20)
    table = pa.table({name: COLUMNS[name]})
    pq.write_table(table, "in.parquet", compression="zstd", use_dictionary=dictionary)
    sources = [{"name": "mill", "type": kind, "path": "in.parquet"}]
    with pytest.raises(
        DataError, match=rf"^in\.parquet: row group 0: column {name}.* unpacks from"
    ):
        run(make_config(sources=sources))
