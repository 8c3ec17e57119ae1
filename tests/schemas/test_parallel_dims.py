"""Ranks on their axes: worked out by hand for six and twelve processes."""

import pytest

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.parallel_dims import Coordinates, ParallelDims


@pytest.mark.parametrize(
    ("neighbors", "pipelines", "copies"),
    [
        ("stages", [[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]]),
        ("replicas", [[0, 2, 4], [1, 3, 5]], [[0, 1], [2, 3], [4, 5]]),
    ],
)
def test_neighboring_ranks_are_stages_or_replicas_as_asked_for(neighbors, pipelines, copies):
    dims = ParallelDims.of(6, stages=3, neighbors=neighbors)
    assert (dims.replicas, dims.world) == (2, 6)
    assert sorted(dims.lines("stage")) == pipelines
    assert sorted(dims.lines("replica")) == copies
    assert dims.rank(Coordinates(stage=1, replica=1)) == pipelines[1][1]


def test_sequence_and_tensor_ranks_of_a_stage_are_the_closest_neighbors():
    dims = ParallelDims(stages=3, sequence=2, tensor=2)
    assert dims.lines("tensor")[:2] == [[0, 1], [2, 3]]
    assert dims.lines("sequence")[:2] == [[0, 2], [1, 3]]
    assert dims.lines("stage")[0] == [0, 4, 8]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sequence": 0}, "sequence ranks = 0: each parallel dimension has 1 or more"),
        ({"replicas": 0}, "replica ranks = 0: each parallel dimension has 1 or more"),
    ],
)
def test_what_is_not_possible_is_refused_in_one_line(sizes, message):
    with pytest.raises(ConfigError) as error:
        ParallelDims(**sizes)
    assert str(error.value) == message


def test_stages_must_divide_the_processes():
    line = "pipeline_stages = 3 does not divide the 4 processes; launch a multiple of 3"
    with pytest.raises(ConfigError, match=line):
        ParallelDims.of(4, stages=3)
