"""On the real model in float32, the loss of every token is transformers' own."""

import pytest
import torch
from runs import STDLIB, make_shards, run_ranks

from headrace.schemas.shards.manifest_file import read_manifest
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.shards.decoded_rows import DecodedRows
from headrace.trainer.shards.row_groups import list_row_groups
from headrace.trainer.shards.row_source import RowSource
from headrace.trainer.shards.shard_reader import ShardReader

pytestmark = pytest.mark.slow

ROWS = 8
CONFIG = """
model = "{model}"
output_dir = "unused"
max_steps = 1
gradient_accumulation_steps = 8
dtype = "float32"
threads = 1
[[datasets]]
path = "{shards}"
[loader]
shuffle = false
[optimizer]
lr = 1e-3
"""


@pytest.fixture(scope="module")
def shards(real_model, tmp_path_factory):
    """Rows of 192 tokens, most of them of several documents."""
    paragraphs = {
        "name": "stdlib",
        "type": "text",
        "path": [str(STDLIB / name) for name in ("bisect.py", "heapq.py", "shlex.py")],
        "document_separator": "\n\n",
    }
    output = tmp_path_factory.mktemp("real") / "shards"
    return make_shards(real_model, output, sequence_len=192, sources=[paragraphs])


@pytest.fixture(scope="module")
def rows(shards):
    manifest = read_manifest(shards)
    order = RowOrder(list_row_groups([manifest], "train"), seed=0, window=1, shuffle=False)
    reader = ShardReader(
        DecodedRows,
        RowSource(directories=[shards], manifests=[manifest], split="train", held_row_groups=1),
    )
    return [reader.row(order[index]) for index in range(ROWS)]


@pytest.fixture(scope="module")
def expected(real_model, rows):
    """Each document through transformers alone, without any mask: [row] of losses by token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    assert sum(len(row.document_lengths) > 1 for row in rows) >= 4, "no masking would be tested"
    losses = []
    with torch.no_grad():
        for row in rows:
            parts = []
            ids = torch.from_numpy(row.input_ids.astype("int64"))
            for document in ids.split(row.document_lengths.tolist()):
                logits = model(input_ids=document[None], use_cache=False).logits[0, :-1]
                loss = torch.nn.functional.cross_entropy(logits, document[1:], reduction="none")
                parts += [loss, torch.zeros(1)]
            losses.append(torch.cat(parts))
    return losses


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_token_losses_equal_transformers(stages, real_model, shards, rows, expected, tmp_path):
    config, output = tmp_path / "train.toml", tmp_path / "losses.pt"
    config.write_text(CONFIG.format(model=real_model, shards=shards))
    run_ranks("token_losses.py", stages, config, output, f"pipeline_stages={stages}")
    losses = torch.load(output)
    for row, ours, reference in zip(rows, losses, expected, strict=True):
        length = len(row.input_ids)
        torch.testing.assert_close(ours[:length], reference, rtol=1e-5, atol=1e-5)
        assert ours[:length].sum().item() == pytest.approx(reference.sum().item(), rel=1e-5)
        assert (ours[length:] == 0).all()
