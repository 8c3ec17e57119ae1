"""Rows that go through the stages in slices: losses, gradients and rows of whole ones."""

from collections import defaultdict

import pytest
from alike_runs import assert_alike, forget_after
from schedules import carry_out

from headrace.trainer.building.interleaved_schedule import (
    most_slices,
    sliced_passes,
    sliced_schedule,
)

PACKED = {"loader__pack": "best_fit", "loader__tokens_per_row": 96, "adapter__dropout": 0.0}
SHAPES = [(1, 3, 2), (2, 3, 4), (3, 2, 5), (4, 4, 2), (4, 2, 8)]  # stages, slices, micro-batches


@pytest.mark.parametrize("shape", SHAPES)
def test_filling_and_draining_take_the_time_of_a_slice_for_each_further_stage(shape):
    stages, slices, micro_batches = shape
    done, time = carry_out(sliced_schedule(*shape))
    assert len(done) == len(set(done)) == 2 * stages * slices * micro_batches
    assert time == 2 * (micro_batches * slices + stages - 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_a_row_come_from_its_last_slice_to_its_first(shape):
    _, slices, micro_batches = shape
    order = defaultdict(list)
    for step in carry_out(sliced_schedule(*shape))[0]:
        order[step.part, step.is_forward].append((step.micro_batch, step.row_slice))
    there = [(index, number) for index in range(micro_batches) for number in range(slices)]
    back = [(index, slices - 1 - number) for index, number in there]
    assert all(seen == (there if forward else back) for (_, forward), seen in order.items())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stage_holds_slices_where_it_would_hold_micro_batches(shape):
    stages, slices, micro_batches = shape
    for stage in range(stages):
        held = most = 0
        for step in sliced_passes(stage, stages, slices, micro_batches):
            held += 1 if step.is_forward else -1
            most = max(most, held)
        assert most == most_slices(stage, stages, slices, micro_batches)


@pytest.mark.slow
def test_stages_of_sliced_rows_train_as_one_process_and_resume_as_one(training):
    kept = {"checkpoint__every_steps": 5, "checkpoint__keep_last": 9, **PACKED}
    one = training.run("one", 1, **kept)
    cut = training.run("cut", 2, pipeline_stages=2, sequence_slices=3, **kept)
    assert_alike(cut, one)
    forget_after(cut, 5)
    assert_alike(training.run("cut", 1, "--resume", **kept), one)
