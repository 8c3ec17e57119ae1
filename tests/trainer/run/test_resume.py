"""A run that is killed at any moment and resumed equals the run that was left alone, bit by bit."""

import random
import shutil
import signal
import sys
import time

import pytest
from alike_runs import forget_after
from background_run import SETTINGS, STEPS, Run, assert_same_tensors
from runs import (
    STDLIB,
    checkpoint_tensors,
    children,
    exact_metrics,
    make_shards,
    read_metrics,
    source,
    start,
    start_cold,
)
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SECOND = source("third", STDLIB / "heapq.py")
MANY = pytest.param(4, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("kills", [1, MANY])
def test_kills_at_random_moments_one_of_them_inside_a_save_change_no_bit(training, kills):
    """Ends with the real command, which Ctrl-C stops, and one that goes on where it stopped."""
    reference = training.run("reference", 2, **SETTINGS)
    seed = random.randrange(1 << 30)
    choose = random.Random(seed)
    sys.stdout.write(f"seed of the moments: {seed}\n")  # shown when the test fails
    directory = training.directory / "killed"

    for kill in range(kills):
        run = Run(training, directory)
        first = run.last_step() if kill else 0
        target = min(first + choose.randint(0, 4), STEPS - 7)
        run.wait_until(lambda run=run, target=target: run.last_step() >= target)
        time.sleep(choose.random() * 0.1)
        run.kill_all()
    kill_inside_a_save(training, directory)
    stop_the_real_command(training, directory)
    Run(training, directory).finish()

    assert exact_metrics(directory) == exact_metrics(reference)
    assert_same_tensors(checkpoint_tensors(directory), checkpoint_tensors(reference))
    file = "adapter/adapter_model.safetensors"
    assert_same_tensors(load_file(directory / file), load_file(reference / file))
    leftovers = list(directory.rglob(".*"))
    assert leftovers == []


def kill_inside_a_save(training, directory):
    for _ in range(6):
        run = Run(training, directory)
        run.wait_until(run.is_saving)
        run.kill_all()
        if run.is_saving():
            return
    raise AssertionError("no kill fell into a save")


def stop_the_real_command(training, directory):
    """SIGINT lets the step end, is saved, and is no failure."""
    run = Run(training, directory, start_cold)
    begun = run.last_step()
    run.wait_until(lambda: run.last_step() > begun)
    run.launcher.send_signal(signal.SIGINT)
    run.finish()
    assert (run.checkpoints / f"step-{run.last_step():06d}" / "run_state.json").is_file()


def test_a_checkpoint_of_two_stages_resumes_with_one_and_two_replicas(training):
    """Other layout, same global batch: the same rows in the same order, weights to rounding."""
    settings = SETTINGS | {"max_steps": 6, "checkpoint__keep_last": 9}
    reference = training.run("reference", 2, **settings)
    moved = shutil.copytree(reference, training.directory / "moved")
    forget_after(moved, 2)
    settings |= {"pipeline_stages": 1, "gradient_accumulation_steps": 2}
    training.run("moved", 2, "--resume", **settings)
    for line, expected in zip(read_metrics(moved), read_metrics(reference), strict=True):
        assert line.get("rows_sha256") == expected.get("rows_sha256")
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_mixture_resumed_from_a_checkpoint_equals_the_uninterrupted_run(training, tiny_model):
    other = make_shards(tiny_model, training.directory / "other", sources=[SECOND])
    with training.config.open("a") as config:
        config.write(f'[[datasets]]\npath = "{other}"\nweight = 0.4\n')
    settings = {"mixing": "interleave", "checkpoint__every_steps": 3, "checkpoint__keep_last": 9}
    reference = training.run("reference", **settings)
    steps = [line for line in read_metrics(reference) if line["kind"] == "train"]
    assert any({"third", "json"} < line["source_losses"].keys() for line in steps)
    resumed = shutil.copytree(reference, training.directory / "resumed")
    for path in resumed.glob("checkpoints/step-*"):
        if path.name != "step-000003":
            shutil.rmtree(path)
    training.run("resumed", 1, "--resume", **settings)
    assert exact_metrics(resumed) == exact_metrics(reference)
    assert_same_tensors(checkpoint_tensors(resumed), checkpoint_tensors(reference))


def test_a_run_that_ended_goes_on_for_more_steps_as_if_they_had_been_planned(training):
    settings = {"scheduler__type": "rms_ratio", "checkpoint__keep_last": 9}
    reference = training.run("reference", max_steps=7, checkpoint__every_steps=4, **settings)
    training.run("longer", max_steps=4, **settings)
    run = training.run("longer", 1, "--resume", max_steps=7, **settings)
    steps = [
        [line for line in exact_metrics(r) if line["kind"] == "train"] for r in (run, reference)
    ]
    assert steps[0] == steps[1]
    assert_same_tensors(checkpoint_tensors(run), checkpoint_tensors(reference))

    forced = {"scheduler__force_constant_lr": 1e-5, "max_steps": 8}
    run = training.run("longer", 1, "--resume", **settings | forced)
    assert read_metrics(run)[-2]["lr"] == 1e-5


@pytest.mark.exhaustive
def test_from_weights_alone_a_run_goes_on_with_its_rows_and_a_fresh_optimizer(training):
    """Adam's first step is about as long as the rate, whatever the moments were before."""
    settings = {"checkpoint__weights_only": True, "checkpoint__every_steps": 3, "max_steps": 6}
    reference = training.run("reference", 2, pipeline_stages=2, **settings)
    resumed = shutil.copytree(reference, training.directory / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "step-000006")
    training.run("resumed", 2, "--resume", pipeline_stages=2, **settings)
    ours, expected = exact_metrics(resumed), exact_metrics(reference)
    assert [line["rows_sha256"] for line in ours] == [line["rows_sha256"] for line in expected]
    assert [line["lr"] for line in ours] == [line["lr"] for line in expected]
    assert ours[:5] == expected[:5]
    assert ours[5]["loss"] != expected[5]["loss"]


def test_a_signal_finishes_the_step_saves_and_exits_with_0(training):
    """SIGTERM; for SIGINT see `stop_the_real_command`."""
    run = Run(training, training.directory / "stopped")
    run.wait_until(lambda: run.last_step() >= 3)
    run.launcher.send_signal(signal.SIGTERM)
    run.finish()
    step = run.last_step()
    assert 3 <= step < STEPS
    assert (run.checkpoints / f"step-{step:06d}" / "run_state.json").is_file()


@pytest.mark.parametrize(
    "start", [start, pytest.param(start_cold, marks=pytest.mark.exhaustive)], ids=["warm", "cold"]
)
def test_one_killed_rank_ends_the_whole_job_at_once(training, start):
    run = Run(training, training.directory / "broken", start)
    run.wait_until(lambda: run.last_step() >= 2)
    ranks = children(run.launcher)
    assert len(ranks) == 2
    random.choice(ranks).kill()
    assert run.launcher.wait(timeout=60) != 0
    assert not any(rank.is_running() for rank in ranks)
