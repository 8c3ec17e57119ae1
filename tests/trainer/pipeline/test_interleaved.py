"""Stages of several chunks wait less and compute the same."""

import shutil
from collections import defaultdict

import pytest
from runs import checkpoint_tensors, exact_metrics
from schedules import carry_out

from headrace.trainer.building.interleaved_schedule import schedule

SHAPES = [(2, 2, 4), (2, 3, 8), (3, 2, 9), (4, 2, 32), (4, 4, 8)]  # stages, chunks, micro-batches
INTERLEAVED = {"pipeline_stages": 2, "schedule": "interleaved", "stage_chunks": 2}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_schedule_never_stands_still_even_if_each_transfer_blocks(shape):
    stages, chunks, micro_batches = shape
    for trains in (True, False):
        done, _ = carry_out(schedule(*shape, trains=trains))
        assert len(done) == len(set(done)) == stages * chunks * micro_batches * (1 + trains)


@pytest.mark.parametrize("micro_batches", [1, 5, 32])
def test_an_evaluation_may_have_any_number_of_micro_batches(micro_batches):
    done, _ = carry_out(schedule(3, 2, micro_batches, trains=False))
    assert len(done) == 6 * micro_batches


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_each_part_add_up_in_the_order_of_micro_batches(shape):
    order = defaultdict(list)
    for step in carry_out(schedule(*shape, trains=True))[0]:
        order[step.part, step.is_forward].append(step.micro_batch)
    assert all(seen == list(range(shape[2])) for seen in order.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_filling_and_draining_take_the_time_of_a_chunk_for_each_further_stage(shape):
    stages, chunks, micro_batches = shape
    _, time = carry_out(schedule(*shape, trains=True))
    assert time == 2 * (micro_batches * chunks + stages - 1)


@pytest.mark.slow
def test_two_stages_of_two_chunks_give_the_bits_of_one_process_and_resume_as_one(training):
    saves = {"max_steps": 6, "checkpoint__every_steps": 3, "checkpoint__keep_last": 9}
    one = training.run("one", 1, **saves)
    both = training.run("both", 2, **INTERLEAVED, **saves)
    assert exact_metrics(both) == exact_metrics(one)
    tensors = checkpoint_tensors(both)
    for name, value in checkpoint_tensors(one).items():
        assert tensors.pop(name).equal(value), name
    assert not tensors
    adapter = "adapter/adapter_model.safetensors"
    assert (both / adapter).read_bytes() == (one / adapter).read_bytes()

    shutil.rmtree(both / "checkpoints" / "step-000006")
    alone = training.run("both", 1, "--resume", **saves)
    assert exact_metrics(alone) == exact_metrics(one)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_all_weights_with_a_tied_embedding_are_trained_and_exported_likewise(training):
    whole = {"adapter__kind": "none"}
    one = training.run("one", 1, **whole)
    four = training.run("four", 4, gradient_accumulation_steps=2, **INTERLEAVED, **whole)
    two = training.run("two", 2, gradient_accumulation_steps=2, **whole)
    assert exact_metrics(four) == exact_metrics(two)
    both = training.run("both", 2, **INTERLEAVED, **whole)
    assert exact_metrics(both) == exact_metrics(one)
    tensors = checkpoint_tensors(both)
    assert all(tensors[name].equal(value) for name, value in checkpoint_tensors(one).items())
    assert (both / "model" / "config.json").is_file()
