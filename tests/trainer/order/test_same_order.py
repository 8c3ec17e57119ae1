"""2,000 global batches hold the same rows in the same order, whatever the layout; here 600."""

import functools
import hashlib
import itertools

import pytest
from loaders import global_batches, open_loader, open_stream
from runs import as_toml, run_ranks

from headrace.schemas.shards.manifest_file import read_manifest
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.shards.row_groups import list_row_groups

BATCHES, FEWER = 2000, 600
RESUMED = 50  # steps in the middle
PACKING = {"tokens_per_row": 160, "look_ahead": 32}
LAYOUTS = list(itertools.product([1, 2, 4], [0, 1, 8]))  # replicas, prefetch
packing = pytest.mark.parametrize("packing", [{}, PACKING], ids=["unpacked", "packed"])


@pytest.fixture(scope="module")
def make(tiny_shards):
    """Loaders of all replicas."""
    manifest = read_manifest(tiny_shards)

    def make(replicas, prefetch, packing, batches):
        loaders = []
        for replica in range(replicas):
            order = RowOrder(list_row_groups([manifest], "train"), seed=5, window=2)
            stream = open_stream(tiny_shards, manifest, order)
            stop_row = None if packing else batches * 8
            tokens = packing.get("tokens_per_row", manifest.sequence_len)
            loader = open_loader(
                stream, stop_row, tokens, replica, replicas, prefetch=prefetch, **packing
            )
            loaders.append(loader)
        return loaders

    return make


def sha256(batches):
    text = "\n".join(",".join(map(str, keys)) for keys in batches)
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def reference(make):
    """One replica, read in line: the digest of so many batches."""

    @functools.cache
    def reference(packed, batches):
        loaders = make(1, 0, PACKING if packed else {}, batches)
        return sha256(global_batches(loaders, batches))

    return reference


def check_layout(make, reference, replicas, prefetch, packing, number):
    batches = global_batches(make(replicas, prefetch, packing, number), number)
    assert len(batches) == number
    assert sha256(batches) == reference(bool(packing), number)


@packing
@pytest.mark.parametrize(("replicas", "prefetch"), [(2, 8), (4, 1)])
def test_replicas_and_read_ahead_change_no_row(make, reference, replicas, prefetch, packing):
    check_layout(make, reference, replicas, prefetch, packing, FEWER)


@pytest.mark.exhaustive
@packing
@pytest.mark.parametrize(("replicas", "prefetch"), LAYOUTS)
def test_no_replicas_and_no_read_ahead_change_a_row(make, reference, replicas, prefetch, packing):
    check_layout(make, reference, replicas, prefetch, packing, BATCHES)


def check_resumed(make, reference, replicas, prefetch, packing, number):
    """Every step in the middle with loaders of their own, that are given the state alone."""
    loaders = make(replicas, 0, packing, number)
    batches = global_batches(loaders, (number - RESUMED) // 2)
    for _ in range(RESUMED):
        states = [loader.state_dict() for loader in loaders]
        assert all(state == states[0] for state in states)
        loaders = make(replicas, prefetch, packing, number)
        for loader in loaders:
            loader.load_state_dict(states[0])
        batches += global_batches(loaders, 1)
    batches += global_batches(loaders, number - len(batches))
    assert sha256(batches) == reference(bool(packing), number)


@packing
def test_resuming_at_fifty_steps_one_after_the_other_changes_no_row(make, reference, packing):
    check_resumed(make, reference, 2, 1, packing, FEWER)


@pytest.mark.exhaustive
@packing
@pytest.mark.parametrize(("replicas", "prefetch"), LAYOUTS)
def test_resuming_fifty_times_in_every_layout_changes_no_row(
    make, reference, replicas, prefetch, packing
):
    check_resumed(make, reference, replicas, prefetch, packing, BATCHES)


def digests(training, name, stages, replicas, steps, prefetch, packing, sequence=1, tensor=1):
    """Of each global batch, from real processes without a model."""
    settings = {
        "pipeline_stages": stages,
        "sequence_parallel": sequence,
        "tensor_parallel": tensor,
        "gradient_accumulation_steps": 8 // replicas,
        "max_steps": steps,
        "loader__prefetch_batches": prefetch,
        **{f"loader__{key}": value for key, value in packing.items()},
    }
    settings |= {"loader__pack": "best_fit"} if packing else {}
    sets = [as_toml(key, value) for key, value in settings.items()]
    output = training.directory / name
    ranks = stages * replicas * sequence * tensor
    run_ranks("feed_rank.py", ranks, training.config, output, *sets, limit=1200)
    result = output.read_text().splitlines()
    assert len(result) == len(set(result)) == steps
    return result


@pytest.mark.slow
def test_stages_change_no_row(training):
    one = digests(training, "one", 1, 1, 300, 0, PACKING)
    assert digests(training, "four", 2, 2, 300, 8, PACKING) == one


@pytest.mark.exhaustive
@pytest.mark.timeout(6000)
@packing
def test_no_stages_and_replicas_change_a_row(training, packing):
    one = digests(training, "one", 1, 1, BATCHES, 0, packing)
    for stages, replicas, tensor in ((1, 1, 2), (2, 1, 1), (1, 2, 2), (2, 2, 1)):
        name = f"{stages}-{replicas}-{tensor}-shared"
        layout = {"sequence": 2, "tensor": tensor}
        rows = digests(training, name, stages, replicas, BATCHES, 1, packing, **layout)
        assert rows == one, name
    for stages, replicas in itertools.product([1, 2, 4], [1, 2, 4]):
        prefetch = (0, 1, 8)[(stages + replicas) % 3]
        name = f"{stages}-{replicas}"
        assert digests(training, name, stages, replicas, BATCHES, prefetch, packing) == one, name
