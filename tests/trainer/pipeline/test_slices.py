"""Rows that go through the stages in slices: losses, gradients and rows of whole ones."""

from collections import defaultdict
from itertools import product

import pytest
from alike_runs import assert_alike, forget_after
from runs import read_metrics
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
    kept = {"max_steps": 6, "checkpoint__every_steps": 3, "checkpoint__keep_last": 9, **PACKED}
    one = training.run("one", 1, **kept)
    cut = training.run("cut", 2, pipeline_stages=2, sequence_slices=3, **kept)
    assert_alike(cut, one)
    forget_after(cut, 3)
    assert_alike(training.run("cut", 1, "--resume", **kept), one)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["lora", "none"], ids=["LoRA", "full"])
def test_every_layout_trains_as_one_process(family_training, kind):
    settings = {**PACKED, "adapter__kind": kind, "max_steps": 4, "checkpoint__keep_last": 9}
    settings |= {"checkpoint__every_steps": 2}
    one = family_training.run("one", 1, **settings)
    for stages, replicas in product((1, 2, 3), (1, 2)):
        layout = {"pipeline_stages": stages, "sequence_slices": 3}
        layout["gradient_accumulation_steps"] = 4 // replicas
        run = family_training.run(f"{stages}-{replicas}", stages * replicas, **settings, **layout)
        assert_alike(run, one)
        forget_after(run, 2)
    layout = {"pipeline_stages": 3, "sequence_slices": 4, "gradient_accumulation_steps": 4}
    for name in ("1-1", "2-1", "3-2"):
        resumed = family_training.run(name, 3, "--resume", **settings, **layout)
        assert_alike(resumed, one)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "settings",
    [
        {"adapter__kind": "control"},
        {"adapter__kind": "dora"},
        {"quantization__backend": "bnb", "weight_offload": "mlp"},
        {"quantization__backend": "hqq"},
        {"activation_checkpointing": "full", "activation_offload": True},
        {"activation_checkpointing": "selective"},
        {"adapter__kind": "none", "optimizer__shard": True, "optimizer__offload": True},
        {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "objective__kind": "dft"},
        {"half_layers": True, "partition": [2.5, 2.5]},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_what_else_a_stage_may_do_goes_with_slices(training, settings):
    settings = {**settings, "adapter__dropout": 0.0, "pipeline_stages": 2}
    one = training.run("one", 2, **settings)
    assert_alike(training.run("cut", 2, sequence_slices=4, **settings), one)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_processes_that_share_rows_share_each_slice_of_them(family_training):
    settings = {**PACKED, "max_steps": 4}
    one = family_training.run("one", 1, **settings)
    layout = {"pipeline_stages": 2, "sequence_parallel": 2, "sequence_slices": 3}
    assert_alike(family_training.run("cut", 4, **settings, **layout), one)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_dropout_of_slices_is_the_same_again(training):
    settings = {"pipeline_stages": 2, "max_steps": 2, "adapter__dropout": 0.5}
    runs = [training.run(name, 2, sequence_slices=2, **settings) for name in ("run", "again")]
    losses = [[line["loss"] for line in read_metrics(run)] for run in runs]
    assert losses[0] == losses[1]
