"""Ranks that share weights read their parts of the files alone, and hold parts of the whole."""

from pathlib import Path

import pytest
import torch
from tiny_families import CPU, config_of, save_tiny

from headrace.trainer.building.model_builder import build_stage
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.tensor_parallel.shard import WHOLE_WEIGHTS, TensorShard

SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 2048}
RANKS = 2


def bytes_read():
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def build(model, shard):
    """A stage, and the bytes that were read for it."""
    config = config_of(model, 1, {"kind": "lora", "rank": 2})
    plan, before = plan_model(config), bytes_read()
    built = build_stage(config, 0, CPU, plan, shard=shard)
    return built, bytes_read() - before


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_rank_reads_and_holds_its_part_of_what_is_stored(family, tmp_path):
    """Rows and columns of single tensors, and experts that are stored one by one."""
    model = save_tiny(family, tmp_path / "model", **SIZES)
    build(model, WHOLE_WEIGHTS)  # imports and caches
    whole, all_bytes = build(model, WHOLE_WEIGHTS)
    expected = whole.stage.canonical_parameters()
    for rank in range(RANKS):
        part, read = build(model, TensorShard(rank, RANKS))
        held = part.stage.canonical_parameters()
        assert held.keys() == expected.keys()
        for name, value in held.items():
            assert torch.equal(value, part.cuts.part(name, expected[name])), name
        assert all_bytes / RANKS < read < 1.15 * all_bytes / RANKS
