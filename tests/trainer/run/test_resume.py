"""A run that is killed at any moment and resumed equals the run that was left alone, bit by bit."""

import random
import shutil
import signal
import sys
import time

import pytest
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

KILLS_BETWEEN = 4
SECOND = source("third", STDLIB / "heapq.py")


def test_five_kills_at_random_moments_one_of_them_inside_a_save_change_no_bit(training):
    reference = training.run("reference", 2, **SETTINGS)
    seed = random.randrange(1 << 30)
    choose = random.Random(seed)
    sys.stdout.write(f"seed of the moments: {seed}\n")  # shown when the test fails
    directory = training.directory / "killed"

    for kill in range(KILLS_BETWEEN):
        run = Run(training, directory)
        first = run.last_step() if kill else 0
        target = min(first + choose.randint(0, 4), STEPS - 3)
        run.wait_until(lambda run=run, target=target: run.last_step() >= target)
        time.sleep(choose.random() * 0.1)
        run.kill_all()
    killed_while_saving = False
    for _ in range(6):
        run = Run(training, directory)
        run.wait_until(run.is_saving)
        run.kill_all()
        killed_while_saving = run.is_saving()
        if killed_while_saving:
            break
    assert killed_while_saving, "no kill fell into a save"
    Run(training, directory, start_cold).finish()

    assert exact_metrics(directory) == exact_metrics(reference)
    assert_same_tensors(checkpoint_tensors(directory), checkpoint_tensors(reference))
    file = "adapter/adapter_model.safetensors"
    assert_same_tensors(load_file(directory / file), load_file(reference / file))
    leftovers = list(directory.rglob(".*"))
    assert leftovers == []


def test_a_checkpoint_of_two_stages_resumes_with_one_and_two_replicas(training):
    """Other layout, same global batch: the same rows in the same order, weights to rounding."""
    reference = training.run("reference", 2, **SETTINGS)
    run = Run(training, training.directory / "moved")
    run.wait_until(lambda: run.last_step() >= 7)
    run.kill_all()
    settings = SETTINGS | {"pipeline_stages": 1, "gradient_accumulation_steps": 2}
    training.run("moved", 2, "--resume", **settings)
    for line, expected in zip(read_metrics(run.directory), read_metrics(reference), strict=True):
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


@pytest.mark.parametrize(
    ("number", "start"),
    [(signal.SIGTERM, start), (signal.SIGINT, start_cold)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_finishes_the_step_saves_and_exits_with_0(training, number, start):
    run = Run(training, training.directory / "stopped", start)
    run.wait_until(lambda: run.last_step() >= 3)
    run.launcher.send_signal(number)
    run.finish()
    step = run.last_step()
    assert 3 <= step < STEPS
    assert (run.checkpoints / f"step-{step:06d}" / "run_state.json").is_file()


def test_one_killed_rank_ends_the_whole_job_at_once(training):
    run = Run(training, training.directory / "broken", start_cold)
    run.wait_until(lambda: run.last_step() >= 2)
    ranks = children(run.launcher)
    assert len(ranks) == 2
    random.choice(ranks).kill()
    assert run.launcher.wait(timeout=20) != 0
    assert not any(rank.is_running() for rank in ranks)
